"""Predictions at the earlier exits of a network, taken on the way to the last one.

A call runs each sample as deep as its noise level asks. On the way a sample passes the exits of the
schedule's shallower depths. Taps keep the hidden states there and turn them into predictions, to
supervise all exits at once (depth-varying diffusion). No block runs twice: for each exit the
network's own forward runs again with every block passed over, so that the final norm, modulation
and projection are its own, whatever its family.
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
from accelkit.runtime.routing import Plan, Router, RunningPass
from accelkit.runtime.switch import Enabled
from accelkit.schedule import Schedule


@dataclass(frozen=True)
class Tap:
    """A prediction at an earlier exit.

    Attributes:
        depth: counted blocks before the exit.
        rows: (n,) int64, the samples of the batch that run deeper.
        output: (n, ...), the output of the network cut to this depth for these samples.
    """

    depth: int
    rows: Tensor
    output: Tensor


def check(backbone: Backbone, schedule: Schedule) -> None:
    """Raise AccelkitError for a schedule of one depth, or a model whose exit is not known."""
    if len(schedule.depths) < 2:
        raise AccelkitError(
            f"the schedule {schedule.name or schedule} runs the same blocks at every noise level, "
            "so there is no earlier exit to supervise; choose one such as dvd-4p, or train without "
            "an intermediate loss (--intermediate-weight 0)"
        )
    if backbone.exit is None:
        raise AccelkitError(
            f"a {backbone.family} cannot be supervised on the way: accelkit knows no module that "
            "turns its hidden states into a prediction; train it without an "
            "intermediate loss (--intermediate-weight 0)"
        )


class Taps:
    """Context in which the earlier exits of a model with a schedule are tapped.

    Only calls that record gradients are tapped. Their own outputs stay as they are.

    Args:
        enabled: the handle that :func:`accelkit.enable` returned for the model.
        heads: context for the exit at a depth, in which another head replaces the network's.

    Attributes:
        depths: depths of the earlier exits, rising.

    Raises:
        AccelkitError: as :func:`check`.
    """

    def __init__(
        self,
        enabled: Enabled,
        heads: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        check(enabled.backbone, enabled.schedule)
        self._router, self._backbone, self._heads = enabled._router, enabled.backbone, heads
        self.depths = enabled.schedule.depths[:-1]
        self._last = _Last()

    def __enter__(self) -> Taps:
        exit = self._backbone.exit
        assert exit is not None  # as checked
        self._router.taps = self
        blocks = enumerate(self._backbone.blocks)
        tapped = {block: index for index, block in blocks if index >= self.depths[0]}
        for block in self._backbone.all_blocks:
            hook = _BlockTap(self._router, block, tapped.get(block))
            patching.put(block, hook, patching.TAP)
        patching.put(exit, _ExitTap(self._router, exit), patching.TAP)
        return self

    def __exit__(self, *exc: object) -> None:
        patching.detach(self._backbone.model, patching.TAP)
        self._router.taps = None

    def pop(self) -> list[Tap]:
        """Return the predictions of this thread's last call, shallowest first, and forget them.

        There is at most one for a depth, and none if no sample of the batch runs deeper.
        """
        taken, self._last.taken = self._last.taken, []
        return taken

    def finish(
        self,
        run: Callable[[RunningPass, Tensor], Any],
        passes: list[tuple[RunningPass, Tensor]],
    ) -> None:
        """Turn what a call's passes kept into predictions.

        Args:
            run: calls the model, within the schedule's hook, on these rows of the batch.
            passes: the call's passes, each with the rows of the batch that it took.
        """
        self._last.taken = []
        for depth in self.depths:
            parts = []
            for running, index in passes:
                kept = {i: arguments for i, arguments in running.tapped if i >= depth}
                hidden = self._hidden(depth, running.plan, kept)
                if hidden is not None:
                    parts.append((hidden, index[: len(hidden)]))
            if parts:
                states = torch.cat([hidden for hidden, _ in parts])
                where = torch.cat([index for _, index in parts])
                with self._heads(depth):
                    output = run(RunningPass(passes[0][0].plan, exit_input=states), where)
                output = output if isinstance(output, Tensor) else output[0]
                self._last.taken.append(Tap(depth, where, output))

    def _hidden(self, depth: int, plan: Plan, kept: dict[int, dict[str, Any]]) -> Tensor | None:
        """Return the exit's input for the samples of a pass that run deeper than ``depth``."""
        backbone, name, count = self._backbone, self._backbone.hidden, plan.rows_at(depth)
        if count == 0:
            return None
        deeper = slice(count)  # the deepest samples come first
        hidden = kept[depth][name][deeper]
        if backbone.sequential:
            return hidden
        per_sample = (*backbone.states, *(backbone.block_batched or ()))
        for index in sorted(kept):  # a skipped block may still have an effect
            arguments = {
                k: rows(v, deeper) if k in per_sample else v for k, v in kept[index].items()
            }
            states = backbone.skipped(index, {**arguments, name: hidden}, None)
            hidden = states[backbone.states.index(name)] if len(backbone.states) > 1 else states
        return hidden


class _Last(threading.local):
    """The predictions of a thread's last call."""

    def __init__(self) -> None:
        self.taken: list[Tap] = []


class _BlockTap(patching.Hook):
    """Keeps the arguments of a block that has an index; passes states on if only the exit runs."""

    def __init__(self, router: Router, block: nn.Module, index: int | None) -> None:
        super().__init__(router)
        self.index = index
        self.names = patching.parameters(block)

    def around(self, forward: Any, args: Any, kwargs: Any) -> Any:
        running = self.router.running  # None while a block is recomputed for its gradients
        if running is not None:
            arguments = dict(zip(self.names, args, strict=False)) | kwargs
            if running.exit_input is not None:
                return self.router.backbone.passed_on(arguments)
            if self.index is not None and running.plan.grad and not running.recomputed:
                running.tapped.append((self.index, arguments))
        return forward(*args, **kwargs)


class _ExitTap(patching.Hook):
    """Gives the exit the tapped hidden states, where no block has run."""

    def __init__(self, router: Router, exit: nn.Module) -> None:
        super().__init__(router)
        self.name = patching.parameters(exit)[0]

    def around(self, forward: Any, args: Any, kwargs: Any) -> Any:
        running = self.router.running
        if running is not None and running.exit_input is not None:
            args = (running.exit_input, *args[1:])
            kwargs = {k: v for k, v in kwargs.items() if k != self.name}
        return forward(*args, **kwargs)
