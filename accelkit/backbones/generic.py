"""A diffusers transformer without a file of its own: its blocks are found by watching a call.

A twin of the network without weights is called once (:mod:`accelkit.backbones.example`), with its
lists of blocks shortened where possible. The call shows which lists of blocks the sample passes
through and in which order; which of a block's arguments are states, because the next block is given
the very tensors that it returned; and which module takes the hidden states of the last one. A
second call, which skips all blocks but the first, has to return the same shape.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.base import TIMES, Backbone
from accelkit.backbones.example import (
    HOW,
    SHARED,
    Design,
    Fit,
    arguments,
    call,
    fit_of,
    lists_of,
    takes,
)
from accelkit.errors import AccelkitError

# The pipelines of these networks count the time up from noise to data, which no call shows.
_TIMES = {"Lumina2Transformer2DModel": "1 - t / 1000"}


class Generic(Backbone):
    """The blocks that a network's sample passes through, found by watching a call.

    A skipped block passes its states on unchanged. Samples of different depths are run in one pass
    per depth.

    Raises:
        AccelkitError: something about the blocks could not be found out.
    """

    timestep_per_token = True
    timestep_guessed = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.family = type(model).__name__
        names = takes(type(model))
        if "timestep" not in names:
            raise _unclear(type(model), "its forward takes no timestep")
        self.found = find(Design.of(model))
        self.batched = tuple(n for n in names if n not in {"timestep", *SHARED})
        self.hidden = self.found.hidden
        self.sequential = self.found.exit is not None
        self._time = _TIMES.get(self.family, "t / 1000" if self.found.unit_time else "t")
        self.timestep_scale, self.timestep_offset = TIMES[self._time]

    def example(self, batch: int = 1, device: torch.device | str = "meta") -> dict[str, Any]:
        """Return arguments for a call of ``batch`` samples whose values do not matter."""
        fit = fit_of(Design.of(self.model))
        if fit.device != "meta" and torch.device(device).type == "meta":
            raise AccelkitError(
                f"{self.family} reads the values of its arguments, so no call without values can "
                "be made up"
            )
        return arguments(self.model, fit.layout, batch, device)

    @property
    def blocks(self) -> list[nn.Module]:
        """Every block that the sample passes through, of one list or several."""
        return [self.model.get_submodule(name) for name in self.found.blocks]

    @property
    def exit(self) -> nn.Module | None:
        """The module that takes the last block's hidden states."""
        return None if self.found.exit is None else self.model.get_submodule(self.found.exit)

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The modules of diffusers' class for them."""
        return [m for m in self.model.modules() if type(m).__name__ == "TimestepEmbedding"]

    def skipped(self, index: int, call: dict[str, Any], depth: int | None) -> Any:
        """Return the states in the order in which this block returns them."""
        return _chosen(call, self.found.states[index])

    def notes(self) -> dict[str, Any]:
        """Return what was found, for a user to check."""
        lists = dict.fromkeys(name.rpartition(".")[0] for name in self.found.blocks)
        return {
            "found_by": "watching a call",
            "block_lists": ", ".join(lists),
            "exit": self.found.exit or "none, blocks pass their states on to the end",
            "model_timestep": f"{self._time}, t being the scheduler's",
        }


@dataclass(frozen=True)
class Found:
    """What a watched call shows.

    Attributes:
        blocks: names of the counted blocks, in the order in which they run.
        states: for each block, the arguments that it returns, in its order.
        hidden: the argument among them that holds the sample's states.
        exit: name of the module that first takes the last block's hidden states; None if none does,
            or if the states change between blocks.
        unit_time: whether the network takes a thousandth of the scheduler's timestep.
    """

    blocks: tuple[str, ...]
    states: tuple[tuple[str, ...], ...]
    hidden: str
    exit: str | None
    unit_time: bool


@dataclass(eq=False)
class _Seen:
    """A call of a module: its arguments by name, in the order of the signature, and its result."""

    name: str
    module: nn.Module
    given: dict[str, Any]
    returned: Any = None

    @property
    def list(self) -> str:
        """Name of the list that the module is in, if it is in one."""
        return self.name.rpartition(".")[0]

    @property
    def returns(self) -> tuple[Any, ...]:
        """The values that it returned."""
        return self.returned if isinstance(self.returned, tuple) else (self.returned,)


class _UnclearError(Exception):
    """The reason why the blocks of a list cannot be counted."""


@lru_cache(maxsize=64)
def find(design: Design) -> Found:
    """Find the blocks of a network that can be skipped.

    Raises:
        AccelkitError: there are none, or what they take or return could not be found out.
    """
    with torch.inference_mode(False):  # Its tensors have no gradients, which _watch depends on.
        try:
            return _found(design, short=True)
        except AccelkitError:  # The network may need all of its blocks.
            return _found(design, short=False)


def _found(design: Design, short: bool) -> Found:
    fit = fit_of(design, short)
    twin = design.twin(fit.device, short)
    unit_time = _unit_time(twin, fit)
    seen, shape = _watch(twin, fit)
    states: dict[str, tuple[str, ...]] = {}
    reasons: list[str] = []
    for name, blocks in lists_of(twin).items():
        own = [s for s in seen if s.list == name]
        try:
            if own and _depends(own[0]):
                states[name] = _states(name, len(blocks), own)
        except _UnclearError as reason:
            reasons.append(str(reason))
    counted = [s for s in seen if s.list in states]
    if not counted:
        reasons.append("none of its lists of modules of one class is given the sample's states")
        raise _unclear(design.kind, reasons[0])
    hidden = next(iter(counted[0].given))
    if any(hidden not in states[s.list] for s in counted):
        raise _unclear(design.kind, f"its blocks return no common state, such as {hidden}")
    exit = _exit(seen, counted, [states[s.list].index(hidden) for s in counted], hidden)
    _check_skipping(twin, fit, counted, states, shape)
    names = [s.name for s in counted]
    if short:
        names = _whole(names, twin.lengths)
    by_block = tuple(states[name.rpartition(".")[0]] for name in names)
    return Found(tuple(names), by_block, hidden, exit, unit_time)


def _whole(names: list[str], lengths: dict[str, int]) -> list[str]:
    """Return all blocks of a network from those that run in its shortened twin.

    Raises:
        AccelkitError: blocks of several lists alternate, so a part does not show the order.
    """
    lists = [name for name, _ in groupby(name.rpartition(".")[0] for name in names)]
    if len(set(lists)) < len(lists):
        raise AccelkitError(f"blocks of {', '.join(dict.fromkeys(lists))} alternate")
    return [f"{name}.{index}" for name in lists for index in range(lengths[name])]


def _watch(twin: nn.Module, fit: Fit) -> tuple[list[_Seen], torch.Size]:
    """Call the twin; return the calls of its modules in the order they began, and its shape.

    Tensors that depend on the sample require gradients, and no others do.
    """
    seen: list[_Seen] = []
    open_calls: list[_Seen] = []
    names = {module: name for name, module in twin.named_modules()}

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        order = takes(type(module))
        given = dict(zip(order, args, strict=False)) | kwargs
        in_order = [n for n in order if n in given] + [n for n in given if n not in order]
        open_calls.append(_Seen(names[module], module, {n: given[n] for n in in_order}))
        seen.append(open_calls[-1])

    def end(module: nn.Module, args: Any, returned: Any) -> None:
        open_calls.pop().returned = returned

    for module in list(names)[1:]:
        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(end)
    given = fit.arguments(twin)
    name = next(iter(given))
    with torch.enable_grad():
        given[name] = given[name].requires_grad_().clone()
        return seen, call(twin, given, fit.device).shape


def _depends(seen: _Seen) -> bool:
    first = next(iter(seen.given.values()), None)
    return isinstance(first, Tensor) and first.requires_grad


def _states(name: str, count: int, calls: list[_Seen]) -> tuple[str, ...]:
    """Return the arguments that the blocks of a list both take and return, in returned order."""
    if sorted(s.name for s in calls) != sorted(f"{name}.{i}" for i in range(count)):
        raise _UnclearError(
            f"its {name} are {count} blocks, and a call makes {len(calls)} calls of them"
        )
    found = {
        tuple(_name_of(value, after.given) for value in before.returns)
        for before, after in pairwise(calls)
    }
    if {len(seen.returns) for seen in calls} == {1}:
        found = {tuple(calls[0].given)[:1]}  # By convention, also in a list of one block.
    if len(found) != 1 or "" in (states := found.pop()) or len(set(states)) < len(states):
        raise _UnclearError(
            f"a {type(calls[0].module).__name__} of its {name} returns {len(calls[0].returns)} "
            "values, and which arguments of the next they become was not seen"
        )
    for seen in calls:
        for value, state in zip(seen.returns, states, strict=False):
            if value is not None and value.shape != seen.given[state].shape:
                raise _UnclearError(
                    f"{seen.name} turns {state} of shape {tuple(seen.given[state].shape)} into "
                    f"{tuple(value.shape)}, so it cannot be skipped"
                )
    return states


def _name_of(value: Any, given: dict[str, Any]) -> str:
    return next((n for n, v in given.items() if v is value and value is not None), "")


def _exit(seen: list[_Seen], counted: list[_Seen], places: list[int], hidden: str) -> str | None:
    """Return the name of the module that the last block's hidden states reach unchanged."""
    made = [s.returns[place] for s, place in zip(counted, places, strict=True)]
    if any(a is not s.given[hidden] for a, s in zip(made, counted[1:], strict=False)):
        return None
    after = seen[seen.index(counted[-1]) + 1 :]
    taker = next((s for s in after if _name_of(made[-1], s.given)), None)
    if taker is None or sum(s.name == taker.name for s in seen) > 1:
        return None
    return taker.name if next(iter(taker.given.values())) is made[-1] else None


def _check_skipping(
    twin: nn.Module,
    fit: Fit,
    counted: list[_Seen],
    states: dict[str, tuple[str, ...]],
    shape: torch.Size,
) -> None:
    """Call the twin, which is of no use afterwards, with all blocks but the first skipped."""
    for seen in counted[1:]:
        order = takes(type(seen.module))

        def skip(*args: Any, _order: Any = order, _own: Any = states[seen.list], **kw: Any) -> Any:
            return _chosen(dict(zip(_order, args, strict=False)) | kw, _own)

        seen.module.forward = skip
    try:
        with torch.no_grad():
            made = str(list(call(twin, fit.arguments(twin), fit.device).shape))
    except Exception as error:  # States that no block ran on can raise anything.
        made = str(error).strip().partition("\n")[0][:100]
    if made != str(list(shape)):
        raise _unclear(
            type(twin),
            f"with all of its blocks but one skipped, a call gives {made} and not {list(shape)}",
        )


def _chosen(given: dict[str, Any], states: tuple[str, ...]) -> Any:
    values = tuple(given[name] for name in states)
    return values if len(values) > 1 else values[0]


def _unit_time(twin: nn.Module, fit: Fit) -> bool:
    """Whether a timestep of 1 reaches the sinusoids that embed time as a thousand."""
    times: list[float] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        time = next(iter((*args, *kwargs.values())))
        times.append(module.scale * (1.0 if time.is_meta else float(time.flatten()[0])))

    handles = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in twin.modules()
        if type(module).__name__.endswith("Timesteps") and hasattr(module, "scale")
    ]
    given = fit.arguments(twin)
    given["timestep"] = torch.ones(2, device="cpu")  # A value on the meta device cannot be read.
    with torch.no_grad(), suppress(Exception):  # The rest of the call may fail on this device.
        call(twin, given, fit.device)
    for handle in handles:
        handle.remove()
    return bool(times) and times[0] >= 100


def _unclear(kind: Any, reason: str) -> AccelkitError:
    return AccelkitError(
        f"accelkit cannot find the blocks of a {kind.__name__} by itself: {reason}; {HOW}"
    )
