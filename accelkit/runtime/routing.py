"""Decides, from a call's timesteps, which blocks each of its samples runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from accelkit.backbones import Backbone
from accelkit.backbones.base import TIMES
from accelkit.compute import Compute
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.runtime import conflicts, recording
from accelkit.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """What one pass over the blocks runs.

    Attributes:
        depth: blocks run by the deepest sample.
        active: rows that run each of them, never rising; None when all samples are equally deep.
        merge: which of the schedule's ways of merging tokens applies, None for none. A number, as a
            compiled graph would take a ratio for one of its inputs, whose shapes it decides.
        grad: whether the pass records gradients.
        grid: height and width of the map of tokens if some are merged.
    """

    depth: int
    active: tuple[int, ...] | None
    merge: int | None
    grad: bool
    grid: tuple[int, int] | None = None

    def staying(self, index: int) -> int | None:
        """Return how many rows run block ``index``, None for all."""
        if index >= self.depth:
            return 0
        return None if self.active is None else self.active[index]


@dataclass(frozen=True)
class Pass:
    """One pass over the blocks, planned.

    Attributes:
        plan: what it runs.
        rows: those of the batch that it is for, in this order; None for all as they are.
        timestep: the scheduler's timestep of all samples of the call; None where they have several
            or reading it would wait for a GPU.
    """

    plan: Plan
    rows: Tensor | None = None
    timestep: float | None = None


@dataclass(eq=False)
class Call:
    """One pass under way: its plan, and what its hooks hand on to each other.

    Attributes:
        plan: what it runs.
        again: whether it is not the model's forward that is under way, but one of its blocks that
            gradient checkpointing runs again.
        left: hidden states of the rows that left, by the block before which they left.
        shortcut: makes up for all skipped blocks at once, None where each does so by itself
            (:meth:`accelkit.backbones.Backbone.shortcut`).
        skipped: arguments of the blocks that the shortcut makes up for.
        seen: index and arguments of the blocks that taps were shown.
        leaving: hidden states that only the exit runs on, None in a pass over the blocks.
    """

    plan: Plan
    again: bool = False
    left: dict[int, Tensor] = field(default_factory=dict)
    shortcut: Callable[[list[dict[str, Any]]], Any] | None = None
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seen: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    leaving: Tensor | None = None


class _Calls(threading.local):
    """A thread's calls under way, the innermost last.

    The list is made with the thread's first look and only ever appended to and popped from:
    torch.compile carries that over a graph break, and loses an attribute that is set.
    """

    def __init__(self) -> None:
        self.stack: list[Call] = []


class Router:
    """Decides per call, from its timesteps, how deep each sample goes.

    Args:
        backbone: the model.
        schedule: what to spend at which noise level.
        scheduler: returns the scheduler in use, or None for the reference process. Asked at every
            call, since a pipeline's scheduler may be exchanged.
        axis: the noise axis of the scheduler at present, if it is known.

    Attributes:
        taps: what taps the exits on the way (:class:`accelkit.runtime.taps.Taps`), if anything.
        fused: the model's forward in few operations (:mod:`accelkit.runtime.fused`), if it has one.
    """

    def __init__(
        self,
        backbone: Backbone,
        schedule: Schedule,
        scheduler: Callable[[], Any],
        axis: NoiseAxis | None = None,
    ) -> None:
        self.backbone = backbone
        self.schedule = schedule
        self.taps: Any = None
        self.fused: Any = None
        self.scheduler = scheduler
        self._plans = WeakTensorKeyDictionary()  # a recomputed block belongs to an earlier call
        self._axis: tuple[Any, NoiseAxis] | None = None if axis is None else (scheduler(), axis)
        self._visited: tuple[Tensor, int, list[float]] | None = None
        self._calls = _Calls()

    @property
    def axis(self) -> NoiseAxis:
        """The noise axis of the scheduler in use."""
        scheduler, known = self.scheduler(), self._axis  # another thread may exchange it
        if known is None or known[0] is not scheduler:
            known = self._axis = (scheduler, NoiseAxis.of(scheduler))
        return known[1]

    @property
    def call(self) -> Call | None:
        """The pass under way in this thread, the innermost of nested ones."""
        stack = self._calls.stack
        return stack[-1] if stack else None

    def run(self, call: Call, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what ``forward`` returns, with ``call`` under way."""
        stack = self._calls.stack
        stack.append(call)
        try:
            return forward(*args, **kwargs)
        finally:
            stack.pop()

    def passes(
        self,
        timestep: Tensor | float,
        batch: int,
        narrows: bool,
        grid: tuple[int, int] | None = None,
    ) -> list[Pass]:
        """Plan a call of ``batch`` samples; ``timestep`` has one value, or one per sample.

        Args:
            timestep: as the model is given it.
            batch: number of samples.
            narrows: whether a batch of mixed depths can be run in one pass that samples leave.
            grid: height and width of the map of tokens, for a schedule that merges some.
        """
        computes, values = self.schedule.computes, None
        if len(computes) > 1 and batch:
            values = self._values(timestep)
        elif self.fused is not None and not recording.by() and batch and _on_the_host(timestep):
            values = self._values(timestep)  # one depth needs no look, its modulations may
        spent = [computes[0]]  # of one depth, or of no samples
        if len(computes) > 1 and values is not None:
            spent = [self.schedule.at(self.axis.level(t)) for t in values]
        time = values[0] if values is not None and len(values) == 1 else None
        grad = torch.is_grad_enabled()
        kinds = set(spent)
        if len(kinds) == 1:
            plan = Plan(spent[0].depth, None, self._merging(spent[0]), grad, grid)
            return [Pass(plan, timestep=time)]
        if len(spent) != batch:
            raise AccelkitError(
                f"got {len(spent)} timesteps for a batch of {batch}; give one, or one per sample"
            )
        if not narrows or len({c.merge for c in kinds}) > 1:
            return [
                Pass(Plan(k.depth, None, self._merging(k), grad, grid), torch.tensor(where))
                for k in dict.fromkeys(spent)
                if (where := [row for row, c in enumerate(spent) if c == k])
            ]
        depths = [c.depth for c in spent]
        order = sorted(range(batch), key=lambda row: -depths[row])
        active = tuple(sum(d > i for d in depths) for i in range(max(depths)))
        index = None if order == list(range(batch)) else torch.tensor(order)
        return [Pass(Plan(max(depths), active, self._merging(spent[0]), grad, grid), index)]

    def step(self, timestep: float | None) -> tuple[Tensor, int] | None:
        """Return the scheduler's timesteps and which of them ``timestep`` is.

        None where that is None, or the scheduler is in no run of such a timestep.
        """
        steps = self._steps()
        if steps is None or timestep not in steps[1]:
            return None
        if getattr(self.scheduler(), "num_inference_steps", None) is None:  # it has all there are
            return None
        return steps[0], steps[1].index(timestep)

    def _merging(self, compute: Compute) -> int | None:
        return None if compute.merge is None else self.schedule.merges.index(compute.merge)

    def call_of(self, hidden: Tensor) -> Call:
        """Return the pass that a block is run for on ``hidden``.

        Gradient checkpointing runs a block again, on the very tensor that it was given at first:
        in a backward, which another thread may make, or another call of the model.
        """
        call, compiling = self.call, torch.compiler.is_compiling()
        backward = not compiling and torch._C._current_graph_task_id() != -1
        plan = self._plans.get(hidden) if call is None or backward else None
        if plan is not None and (call is None or plan is not call.plan):
            return Call(plan, again=True)
        if call is None:
            recording.refuse(self.schedule)
            if recording.by() == "torch.fx":
                raise AccelkitError(
                    "torch.fx traces the forward of the model's class, without the schedule of "
                    "this model; trace a module that calls the model"
                )
            conflicts.check(self.backbone, self.schedule)  # which may name what did it
            raise AccelkitError(
                "a block was run that no call of its model is under way for: something took "
                "the schedule's hook off the model, or called the block by itself; call "
                "accelkit.disable"
            )
        if call.plan.grad and not torch.is_grad_enabled():
            raise AccelkitError(
                "a schedule cannot run inside reentrant gradient checkpointing, where gradients of "
                "samples that leave would be lost; enable it with use_reentrant=False"
            )
        if call.plan.grad and not compiling:
            self._plans[hidden] = call.plan
        return call

    def _values(self, timestep: Tensor | float) -> list[float]:
        """The scheduler's timesteps of those that the model is given."""
        scheduled = self.backbone.scheduler_timestep
        if not isinstance(timestep, Tensor):
            return [scheduled(float(timestep))]
        if timestep.numel() > 1 and any(timestep.stride()):
            values = timestep.flatten().tolist()
        else:
            values = [self._single(timestep)]
        if self.backbone.timestep_guessed:
            self._compare(values[0])
        values = [scheduled(value) for value in values]
        if timestep.dtype not in _COARSE:
            return values
        return self._unrounded(values, torch.finfo(timestep.dtype).eps)

    def _single(self, timestep: Tensor) -> float:
        """Return the one value of ``timestep`` without waiting for the device if possible.

        A sampling loop hands on elements of ``scheduler.timesteps``. Such a view's place in the
        storage tells which one it is, so only the first call of a run reads the device.
        """
        steps = self._steps()
        place = None if timestep.is_cpu or steps is None else place_in(timestep, steps[0])
        return timestep.flatten()[0].item() if steps is None or place is None else steps[1][place]

    def _compare(self, given: float) -> None:
        """Raise AccelkitError for a timestep that is one of a run's only on another scale.

        Whether it counts up or down is not told so: any number may be a step's mirror image, as in
        a loop of one's own that draws timesteps.
        """
        steps = self._steps()
        if steps is None or getattr(self.scheduler(), "num_inference_steps", None) is None:
            return
        scheduled = self.backbone.scheduler_timestep
        read, span = scheduled(given), abs(scheduled(1.0) - scheduled(0.0))
        others = {n: (a, b) for n, (a, b) in TIMES.items() if abs(abs(span * a) - 1) > 0.5}
        names = {name: (given - b) / a for name, (a, b) in others.items()}
        fits = [n for n, t in names.items() if any(abs(s - t) <= 1e-2 * abs(s) for s in steps[1])]
        if fits and not any(abs(s - read) <= 1e-2 * abs(s) for s in steps[1]):
            raise AccelkitError(
                f"this {type(self.backbone.model).__name__} is given the timestep {given:g}, which "
                f"accelkit reads as its scheduler's {read:g} and is {fits[0]} for one that it has; "
                "register a backbone with its timestep_scale (accelkit.register_backbone), or call "
                "accelkit.disable"
            )

    def _unrounded(self, values: list[float], eps: float) -> list[float]:
        """Undo what half precision did to a timestep: bfloat16 moves 999 to 1000.

        One that none of the scheduler's can have been rounded to is taken as it is.
        """
        steps = self._steps()
        if steps is None:
            return values
        near = [min(steps[1], key=lambda s: abs(s - v)) for v in values]
        return [s if abs(s - v) <= eps * abs(v) else v for s, v in zip(near, values, strict=True)]

    def _steps(self) -> tuple[Tensor, list[float]] | None:
        """The scheduler's timesteps as it has them, and as numbers."""
        steps = getattr(self.scheduler(), "timesteps", None)
        if not isinstance(steps, Tensor) or steps.ndim != 1 or not len(steps):
            return None
        version = -1 if steps.is_inference() else steps._version
        known = self._visited  # another thread may exchange it
        if known is None or known[0] is not steps or known[1] != version:
            known = self._visited = (steps, version, steps.tolist())
        return steps, known[2]


def _on_the_host(timestep: Tensor | float) -> bool:
    """Whether a timestep is that of all samples, and can be read without waiting for a GPU."""
    return isinstance(timestep, Tensor) and timestep.is_cpu and not any(timestep.stride())


_COARSE = (torch.bfloat16, torch.float16)


def place_in(view: Tensor, whole: Tensor) -> int | None:
    """Return which element of the 1-D ``whole`` a one-valued ``view`` shows, None if it doesn't."""
    same = (
        view.dtype == whole.dtype
        and view.device == whole.device
        and view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    )
    offset = int(view.storage_offset()) - int(whole.storage_offset())
    place, rest = divmod(offset, max(1, whole.stride(0)))
    return place if same and rest == 0 and 0 <= place < len(whole) else None
