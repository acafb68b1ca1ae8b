"""What a network returns after the earlier parts of its blocks, taken on the way to the end.

A call runs each sample as deep as its noise level asks. The shallower depths of the schedule are
exits that a deeper sample passes by; taps keep the hidden states there and turn them into
predictions, as supervising all parts at once needs (depth-varying diffusion), and no block runs
twice. The final norm, the modulation and the projection are the network's own, whatever its family,
because they run in its own forward: once more for each exit, around no block at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.base import Backbone, rows
from accelkit.errors import AccelkitError
from accelkit.runtime import patching
from accelkit.runtime.routing import Call, Plan, Router
from accelkit.runtime.switch import Enabled
from accelkit.schedule import Schedule


@dataclass(frozen=True)
class Tap:
    """A prediction made on the way.

    Attributes:
        depth: after how many of the counted blocks.
        rows: (n,) int64, which samples of the batch: those that run deeper.
        output: (n, ...), what the network cut to this depth returns for them.
    """

    depth: int
    rows: Tensor
    output: Tensor


Heads = Callable[[int], AbstractContextManager[None]]


def one_head(depth: int) -> AbstractContextManager[None]:
    """Use the network's head at every exit."""
    return nullcontext()


def check(backbone: Backbone, schedule: Schedule) -> None:
    """Raise AccelkitError for a schedule of one depth, or a model whose exit is not known."""
    if len(schedule.depths) < 2:
        raise AccelkitError(
            f"the schedule {schedule.name or schedule} runs the same blocks at every noise level, "
            "so that there is no earlier exit to supervise; name one such as dvd-4p, or train "
            "without an intermediate loss (--intermediate-weight 0)"
        )
    if backbone.exit is None:
        raise AccelkitError(
            f"a {backbone.family} cannot be supervised on the way: accelkit knows no module that "
            "turns its hidden states into a prediction; train it without an "
            "intermediate loss (--intermediate-weight 0)"
        )


class Taps:
    """Taps the exits of a model with a schedule in force, for as long as it is entered.

    Only calls that record gradients are tapped. Their own outputs stay as they are.

    Args:
        enabled: what :func:`accelkit.enable` returned for the model.
        heads: entered around the exit of a depth, to use another head than the network's there.

    Attributes:
        depths: those of the exits that deeper samples pass by, rising.

    Raises:
        AccelkitError: as :func:`check`.
    """

    def __init__(self, enabled: Enabled, heads: Heads = one_head) -> None:
        check(enabled.backbone, enabled.schedule)
        self._router, self._backbone, self._heads = enabled._router, enabled.backbone, heads
        self.depths = enabled.schedule.depths[:-1]
        self._last = _Last()

    def __enter__(self) -> Taps:
        self._router.taps = self
        self.attach()
        return self

    def __exit__(self, *exc: object) -> None:
        patching.detach(self._backbone.model, patching.TAP)
        self._router.taps = None

    def attach(self) -> None:
        """Hook into the model, outside of the schedule's own hooks."""
        exit = self._backbone.exit
        assert exit is not None  # or there would be no taps
        counted = {block: index for index, block in enumerate(self._backbone.blocks)}
        for block in self._backbone.all_blocks:
            patching.put(block, _BlockTap(self, block, counted.get(block)), patching.TAP)
        patching.put(exit, _ExitTap(self._router, exit), patching.TAP)

    def pop(self) -> list[Tap]:
        """Return what this thread's last call gave, shallowest first, and forget it.

        No more than one tap for a depth, none where no sample of the batch runs deeper.
        """
        taken, self._last.taken = self._last.taken, []
        return taken

    def see(self, index: int, arguments: dict[str, Any]) -> None:
        """Keep what block ``index`` was called with, if something is tapped there or before."""
        call = self._router.call  # None when a block is run again for its gradients
        if call is not None and not call.again and call.plan.grad and index >= self.depths[0]:
            call.seen.append((index, arguments))

    def finish(self, run: Callable[[Call, Tensor], Any], passes: list[tuple[Call, Tensor]]) -> None:
        """Turn what was seen in a model's call into predictions.

        Args:
            run: calls the model, below the schedule's hook, on these rows of the batch.
            passes: the call's passes, and the rows of the batch that each was for.
        """
        self._last.taken = []
        for depth in self.depths:
            parts = []
            for call, index in passes:
                seen = {i: arguments for i, arguments in call.seen if i >= depth}
                hidden = self._hidden(depth, call.plan, seen)
                if hidden is not None:
                    parts.append((hidden, index[: len(hidden)]))
            if parts:
                leaving = torch.cat([hidden for hidden, _ in parts])
                where = torch.cat([index for _, index in parts])
                with self._heads(depth):
                    output = run(Call(passes[0][0].plan, leaving=leaving), where)
                output = output if isinstance(output, Tensor) else output[0]
                self._last.taken.append(Tap(depth, where, output))

    def _hidden(self, depth: int, plan: Plan, calls: dict[int, dict[str, Any]]) -> Tensor | None:
        """Return the exit's input for the samples of a pass that run deeper than ``depth``."""
        backbone, name, staying = self._backbone, self._backbone.hidden, plan.staying(depth)
        if staying == 0:
            return None
        deeper = slice(staying)  # the deepest samples come first
        hidden = calls[depth][name][deeper]
        if backbone.sequential:
            return hidden
        per_sample = (*backbone.states, *(backbone.block_batched or ()))
        for index in sorted(calls):  # a block that was left out may still do something
            call = {k: rows(v, deeper) if k in per_sample else v for k, v in calls[index].items()}
            states = backbone.skipped(index, {**call, name: hidden}, None)
            hidden = states[backbone.states.index(name)] if len(backbone.states) > 1 else states
        return hidden


class _Last(threading.local):
    """What a thread's last call gave."""

    def __init__(self) -> None:
        self.taken: list[Tap] = []


class _BlockTap(patching.Hook):
    """Shows the taps what a block is called with; passes states on where only the exit runs."""

    def __init__(self, taps: Taps, block: nn.Module, index: int | None) -> None:
        super().__init__(taps._router)
        self.taps, self.index = taps, index
        self.names = patching.parameters(block)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if (call := self.router.call) is not None and call.leaving is not None:
            return self.router.backbone.passed_on(arguments)
        if self.index is not None:
            self.taps.see(self.index, arguments)
        return self.fn_ref.original_forward(*args, **kwargs)


class _ExitTap(patching.Hook):
    """Gives the exit the tapped hidden states in place of those that no block has run on."""

    def __init__(self, router: Router, exit: nn.Module) -> None:
        super().__init__(router)
        self.name = patching.parameters(exit)[0]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (call := self.router.call) is not None and call.leaving is not None:
            args = (call.leaving, *args[1:])
            kwargs = {k: v for k, v in kwargs.items() if k != self.name}
        return self.fn_ref.original_forward(*args, **kwargs)
