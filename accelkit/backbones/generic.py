"""A diffusers transformer that accelkit has no file for: its blocks are found by watching a call.

A twin of the network without weights is called once (example.py), of whose lists of blocks two and
the last are left where that suffices, and every block is seen with what it is given and what it
returns. That tells which lists of blocks the sample passes through and in which order; which of a
block's arguments are states, because the next block is given the very tensors that it returned; and
which module takes the hidden states of the last one. A second call, which skips all blocks but the
first, has to return the same shape.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.base import Backbone
from accelkit.backbones.example import HOW, SHARED, Design, Fit, arguments, call, fit_of, lists_of
from accelkit.errors import AccelkitError

# Pipelines of these give the network 1 - t / 1000, so that it counts up from noise to data.
_UPWARD = ("Lumina2Transformer2DModel",)


class Generic(Backbone):
    """The blocks that a network's sample passes through, as found by watching a call.

    A skipped block passes its states on as it got them. Samples of different depths are run in one
    pass for each depth.

    Raises:
        AccelkitError: something about the blocks could not be found out.
    """

    timestep_per_token = True
    timestep_guessed = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.family = type(model).__name__
        names = _takes(type(model))
        if "timestep" not in names:
            raise _unclear(type(model), "its forward takes no timestep")
        self.found = find(Design.of(model))
        self.batched = tuple(n for n in names if n not in {"timestep", *SHARED})
        self.hidden = self.found.hidden
        self.sequential = self.found.exit is not None
        self.timestep_scale = 1e-3 if self.found.unit_time else 1.0
        self._upward = type(model).__name__ in _UPWARD

    def example(self, batch: int = 1, device: torch.device | str = "meta") -> dict[str, Any]:
        """Return the arguments of a call of ``batch`` samples whose numbers nobody looks at."""
        fit = fit_of(Design.of(self.model))
        if fit.device != "meta" and torch.device(device).type == "meta":
            raise AccelkitError(
                f"{self.family} reads the values that it is given, so that no call of it can be "
                "made up without values"
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
        """Those of diffusers' own class."""
        return [m for m in self.model.modules() if type(m).__name__ == "TimestepEmbedding"]

    def skipped(self, index: int, call: dict[str, Any], depth: int | None) -> Any:
        """Return the states in the order in which this block does."""
        states = tuple(call[name] for name in self.found.states[index])
        return states if len(states) > 1 else states[0]

    def model_timestep(self, timestep: Tensor) -> Tensor:
        """Return what the model is given for timesteps of the scheduler."""
        return 1 - timestep / 1000 if self._upward else super().model_timestep(timestep)

    def scheduler_timestep(self, timestep: float) -> float:
        """Return the scheduler's timestep of one that the model is given."""
        return 1000 * (1 - timestep) if self._upward else super().scheduler_timestep(timestep)

    def notes(self) -> dict[str, Any]:
        """Return what was found, for a user to check."""
        given = "1 - t / 1000" if self._upward else "t / 1000" if self.found.unit_time else "t"
        lists = dict.fromkeys(name.rpartition(".")[0] for name in self.found.blocks)
        return {
            "found_by": "watching a call",
            "block_lists": ", ".join(lists),
            "exit": self.found.exit or "none, blocks pass their states on to the end",
            "model_timestep": f"{given}, t being the scheduler's",
        }


@dataclass(frozen=True)
class Found:
    """What watching a call tells.

    Attributes:
        blocks: names of the counted blocks, in the order in which they run.
        states: of each, the arguments that it returns, in its order.
        hidden: which of them is the sample's.
        exit: name of the module that first takes the last block's hidden states; None if none does,
            or if something happens to them between blocks.
        unit_time: whether the network takes a thousandth of the scheduler's timestep.
    """

    blocks: tuple[str, ...]
    states: tuple[tuple[str, ...], ...]
    hidden: str
    exit: str | None
    unit_time: bool


@dataclass(eq=False)
class _Seen:
    """A call of a module: its arguments by name and what it returned."""

    name: str
    module: nn.Module
    given: dict[str, Any]
    returned: Any = None

    @property
    def returns(self) -> tuple[Any, ...]:
        return self.returned if isinstance(self.returned, tuple) else (self.returned,)


class _UnclearError(Exception):
    """Why the blocks of a list cannot be counted."""


@lru_cache(maxsize=64)
def find(design: Design) -> Found:
    """Find the blocks of a network that can be skipped.

    Raises:
        AccelkitError: there are none, or what they take or return could not be found out.
    """
    with torch.inference_mode(False):  # whose tensors require no gradients, which _watch follows
        try:
            return _found(design, short=True)
        except AccelkitError:  # it needs all of its blocks, or is not found among them either
            return _found(design, short=False)


def _found(design: Design, short: bool) -> Found:
    fit = fit_of(design, short)
    twin = design.twin(fit.device, short)
    seen, shape = _watch(twin, fit)
    states: dict[str, tuple[str, ...]] = {}
    reasons: list[str] = []
    for name, blocks in lists_of(twin).items():
        own = [s for s in seen if s.name.rpartition(".")[0] == name]
        try:
            if own and _depends(own[0]):
                states[name] = _states(name, len(blocks), own)
        except _UnclearError as reason:
            reasons.append(str(reason))
    counted = [s for s in seen if s.name.rpartition(".")[0] in states]
    if not counted:
        none = "none of its lists of modules of one class is given the sample's states"
        raise _unclear(design.kind, next(iter(reasons), none))
    by_block = tuple(states[s.name.rpartition(".")[0]] for s in counted)
    hidden = next(iter(counted[0].given))
    if any(hidden not in names for names in by_block):
        raise _unclear(design.kind, f"its blocks return no common state, such as {hidden}")
    exit = _exit(seen, counted, [names.index(hidden) for names in by_block], hidden)
    _check_skipping(twin, fit, counted, by_block, shape)
    names = [s.name for s in counted]
    if short:
        names = _whole(names, twin.lengths)
        by_block = tuple(states[name.rpartition(".")[0]] for name in names)
    return Found(tuple(names), by_block, hidden, exit, _unit_time(design, fit, short))


def _whole(names: list[str], lengths: dict[str, int]) -> list[str]:
    """Return the blocks that a network runs whose shortened twin ran these.

    Raises:
        AccelkitError: blocks of several lists take turns, so that a part does not tell the order.
    """
    lists = [name for name, _ in groupby(name.rpartition(".")[0] for name in names)]
    if len(set(lists)) < len(lists):
        raise AccelkitError(f"blocks of {', '.join(dict.fromkeys(lists))} take turns")
    return [f"{name}.{index}" for name in lists for index in range(lengths[name])]


def _watch(twin: nn.Module, fit: Fit) -> tuple[list[_Seen], torch.Size]:
    """Return every call of a module within a call of the twin, as they began, and its shape.

    What depends on the sample requires gradients, and nothing else does.
    """
    seen: list[_Seen] = []

    def watch(name: str, module: nn.Module) -> None:
        takes, open_calls = _takes(type(module)), []

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = dict(zip(takes, args, strict=False)) | kwargs
            order = sorted(given, key=lambda n: takes.index(n) if n in takes else len(takes))
            open_calls.append(_Seen(name, module, {n: given[n] for n in order}))
            seen.append(open_calls[-1])

        def end(module: nn.Module, args: Any, returned: Any) -> None:
            open_calls.pop().returned = returned

        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(end)

    for name, module in twin.named_modules():
        if name:
            watch(name, module)
    given = _given(twin, fit)
    name = next(iter(given))
    with torch.enable_grad():
        given[name] = given[name].requires_grad_().clone()
        return seen, call(twin, given, fit.device).shape


def _depends(seen: _Seen) -> bool:
    first = next(iter(seen.given.values()), None)
    return isinstance(first, Tensor) and first.requires_grad


def _states(name: str, count: int, calls: list[_Seen]) -> tuple[str, ...]:
    """Return the arguments that the blocks of a list take and return, in the latter's order."""
    if sorted(s.name for s in calls) != sorted(f"{name}.{i}" for i in range(count)):
        raise _UnclearError(
            f"its {name} are {count} blocks, and a call makes {len(calls)} calls of them"
        )
    kind = type(calls[0].module).__name__
    found = {
        tuple(_name_of(value, after.given) for value in before.returns)
        for before, after in pairwise(calls)
    }
    if {len(seen.returns) for seen in calls} == {1}:
        found = {tuple(calls[0].given)[:1]}  # "hidden states first", also of a list of one block
    if len(found) != 1 or "" in (states := found.pop()) or len(set(states)) < len(states):
        raise _UnclearError(
            f"a {kind} of its {name} returns {len(calls[0].returns)} values, and which arguments "
            "of the next they become was not seen"
        )
    for seen in calls:
        for value, state in zip(seen.returns, states, strict=False):
            if value is not None and value.shape != seen.given[state].shape:
                raise _UnclearError(
                    f"{seen.name} turns {state} of shape {tuple(seen.given[state].shape)} into "
                    f"{tuple(value.shape)}, so that it cannot be skipped"
                )
    return states


def _name_of(value: Any, given: dict[str, Any]) -> str:
    return next((n for n, v in given.items() if v is value and value is not None), "")


def _exit(seen: list[_Seen], counted: list[_Seen], places: list[int], hidden: str) -> str | None:
    """Return the name of the module that the last block's hidden states reach untouched."""
    made = [s.returns[place] for s, place in zip(counted, places, strict=True)]
    if any(a is not s.given[hidden] for a, s in zip(made, counted[1:], strict=False)):
        return None
    after = seen[seen.index(counted[-1]) + 1 :]
    taker = next((s for s in after if _name_of(made[-1], s.given)), None)
    once = taker is not None and sum(s.name == taker.name for s in seen) == 1
    first = taker is not None and next(iter(taker.given.values())) is made[-1]
    return taker.name if taker is not None and once and first else None


def _check_skipping(
    twin: nn.Module,
    fit: Fit,
    counted: list[_Seen],
    by_block: tuple[tuple[str, ...], ...],
    shape: torch.Size,
) -> None:
    """Call the twin, which is of no use after it, with all blocks but the first skipped."""
    for seen, states in list(zip(counted, by_block, strict=True))[1:]:
        takes = _takes(type(seen.module))

        def skip(*args: Any, _states: Any = states, _takes: Any = takes, **kwargs: Any) -> Any:
            given = dict(zip(_takes, args, strict=False)) | kwargs
            passed = tuple(given[name] for name in _states)
            return passed if len(passed) > 1 else passed[0]

        seen.module.forward = skip
    given = _given(twin, fit)
    try:
        with torch.no_grad():
            made = str(list(call(twin, given, fit.device).shape))
    except Exception as error:  # whatever the network makes of states that no block ran on
        made = str(error).strip().partition("\n")[0][:100]
    if made != str(list(shape)):
        raise _unclear(
            type(twin),
            f"with all of its blocks but one skipped, a call gives {made} and not {list(shape)}",
        )


def _unit_time(design: Design, fit: Fit, short: bool) -> bool:
    """Whether the sinusoids that embed time are taken of a thousand for a timestep of 1."""
    twin = design.twin(fit.device, short)

    def look(module: Any, args: Any, kwargs: Any) -> None:
        time = next(iter((*args, *kwargs.values())))
        raise _SeenTime(module.scale * (1.0 if time.is_meta else float(time.flatten()[0])))

    for module in twin.modules():
        if type(module).__name__.endswith("Timesteps") and hasattr(module, "scale"):
            module.register_forward_pre_hook(look, with_kwargs=True)
    given = _given(twin, fit)
    given["timestep"] = torch.ones(2, device="cpu")  # whose value can be read
    try:
        with torch.no_grad():
            call(twin, given, fit.device)
    except _SeenTime as seen:
        return bool(seen.args[0] >= 100)
    except Exception:  # it embeds time in a way of its own, on the device of its weights
        return False
    return False


class _SeenTime(Exception):  # noqa: N818 - what a call was made for, not that it failed
    """The number that sinusoids were to be taken of; the call is over."""


def _given(twin: nn.Module, fit: Fit) -> dict[str, Any]:
    return arguments(twin, fit.layout, 2, fit.device, tiny=fit.device != "meta")


def _takes(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def _unclear(kind: Any, reason: str) -> AccelkitError:
    return AccelkitError(
        f"accelkit cannot find the blocks of a {kind.__name__} by itself: {reason}; {HOW}"
    )
