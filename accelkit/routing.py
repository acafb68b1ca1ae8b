"""Decides, from a call's timesteps, which blocks each of its samples runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from accelkit import others
from accelkit.backbones import Backbone
from accelkit.backbones.base import TIMES
from accelkit.compute import Compute
from accelkit.errors import AccelkitError
from accelkit.noise import NoiseAxis
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
    """One pass over the blocks and the rows it is for, in this order; None for all as they are."""

    plan: Plan
    rows: Tensor | None


class Router:
    """Decides per call, from its timesteps, how deep each sample goes.

    Args:
        backbone: the model.
        schedule: what to spend at which noise level.
        scheduler: returns the scheduler in use, or None for the reference process. Asked at every
            call, since a pipeline's scheduler may be exchanged.

    Attributes:
        running: the plan of the pass under way, None outside of the model's forward.
        block: the plan of the last block begun, be it run again for its gradients.
        left: hidden states of the rows that left it, by the block that they left before.
        ready: passes planned ahead of a compiled call, whose graph cannot look at timesteps.
        taps: what taps the exits on the way (:class:`accelkit.taps.Taps`), None for nothing.
        fused: the model's forward in few operations (:mod:`accelkit.fused`), None for its own.
    """

    def __init__(
        self, backbone: Backbone, schedule: Schedule, scheduler: Callable[[], Any]
    ) -> None:
        self.backbone = backbone
        self.schedule = schedule
        self.running: Plan | None = None
        self.block: Plan | None = None
        self.left: dict[int, Tensor] = {}
        self.ready: list[Pass] | None = None
        self.taps: Any = None
        self.fused: Any = None
        self.scheduler = scheduler
        self._plans = WeakTensorKeyDictionary()  # a recomputed block belongs to an earlier call
        self._axis: tuple[Any, NoiseAxis] | None = None
        self._visited: tuple[Tensor, int, list[float]] | None = None
        self._call = threading.local()  # .timestep of all of its samples, where that is known

    @property
    def axis(self) -> NoiseAxis:
        """The noise axis of the scheduler in use."""
        scheduler = self.scheduler()
        if self._axis is None or self._axis[0] is not scheduler:
            self._axis = (scheduler, NoiseAxis.of(scheduler))
        return self._axis[1]

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
        spent = [self.schedule.computes[0]]  # needs no look at the timestep if there is no other
        self._call.timestep = None
        if len(self.schedule.computes) > 1 and batch:
            values = self._values(timestep)
            self._call.timestep = values[0] if len(values) == 1 else None
            spent = [self.schedule.at(self.axis.level(t)) for t in values]
        elif (
            batch
            and isinstance(timestep, Tensor)
            and timestep.is_cpu
            and not any(timestep.stride())
        ):
            self._call.timestep = self._values(timestep)[0]
        grad = torch.is_grad_enabled()
        kinds = set(spent)
        if len(kinds) == 1:
            return [Pass(Plan(spent[0].depth, None, self._merging(spent[0]), grad, grid), None)]
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

    def step(self) -> tuple[Tensor, int] | None:
        """Return the scheduler's timesteps and which of them the call under way is for.

        None where its samples have several, the scheduler does not have it, or nobody looked: a
        schedule of one depth does not wait for a GPU to tell.
        """
        steps = self._steps()
        if steps is None or self._call.timestep not in steps[1]:
            return None
        if getattr(self.scheduler(), "num_inference_steps", None) is None:  # it has all there are
            return None
        return steps[0], steps[1].index(self._call.timestep)

    def _merging(self, compute: Compute) -> int | None:
        return None if compute.merge is None else self.schedule.merges.index(compute.merge)

    def plan_of(self, hidden: Tensor) -> Plan:
        """Return the plan of the pass that a block is run for on ``hidden``.

        Outside of the model's forward gradient checkpointing runs a block again, on the very
        tensor that it was given at first.
        """
        plan = self.running
        if plan is None:
            if (plan := self._plans.get(hidden)) is None:
                others.check(self.backbone, self.schedule)  # which may name what did it
                raise AccelkitError(
                    "a block was run that no call of its model is under way for: something took "
                    "the schedule's hook off the model, or called the block by itself; call "
                    "accelkit.disable"
                )
            self.block = plan
            return plan
        if plan.grad and not torch.is_grad_enabled():
            raise AccelkitError(
                "a schedule cannot run inside reentrant gradient checkpointing, where gradients of "
                "samples that leave would be lost; enable it with use_reentrant=False"
            )
        if plan.grad and not torch.compiler.is_compiling():
            self._plans[hidden] = plan
        self.block = plan
        return plan

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
        if self._visited is None or self._visited[0] is not steps or self._visited[1] != version:
            self._visited = (steps, version, steps.tolist())
        return steps, self._visited[2]


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
