"""A network's timesteps read as its scheduler's, and which scheduler that is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones import Backbone
from accelkit.backbones.base import TIMES
from accelkit.errors import AccelkitError

_COARSE = (torch.bfloat16, torch.float16)


class Timesteps:
    """Reads the timesteps that a network is given as those of its scheduler.

    Args:
        backbone: the network.
        scheduler: returns the scheduler in use, None for the reference process.
    """

    def __init__(self, backbone: Backbone, scheduler: Callable[[], Any]) -> None:
        self._backbone = backbone
        self._scheduler = scheduler
        self._listed: tuple[Tensor, int, list[float]] | None = None

    def read(self, timestep: Tensor | float) -> list[float]:
        """Return the scheduler's timesteps of a call: one for all samples, or one per sample."""
        scheduled = self._backbone.scheduler_timestep
        if not isinstance(timestep, Tensor):
            return [scheduled(float(timestep))]
        several = timestep.numel() > 1 and any(timestep.stride())
        values = timestep.flatten().tolist() if several else [self._single(timestep)]
        if self._backbone.timestep_guessed:
            self._check_scale(values[0])
        values = [scheduled(value) for value in values]
        if timestep.dtype not in _COARSE:
            return values
        return self._unrounded(values, torch.finfo(timestep.dtype).eps)

    def step(self, timestep: float | None) -> tuple[Tensor, int] | None:
        """Return the timesteps of the scheduler's sampling run and the index of ``timestep``.

        None where the scheduler is in no run, or the run has no such timestep.
        """
        steps = self._run()
        if steps is None or timestep not in steps[1]:
            return None
        return steps[0], steps[1].index(timestep)

    def _single(self, timestep: Tensor) -> float:
        """Return the one value of ``timestep``, without waiting for the device if possible.

        A sampling loop passes elements of ``scheduler.timesteps``. The offset of such a view in the
        storage identifies it, so only the first call of a run reads the device.
        """
        if not timestep.is_cpu and (steps := self._steps()) is not None:
            place = place_in(timestep, steps[0])
            if place is not None:
                return steps[1][place]
        return timestep.flatten()[0].item()

    def _check_scale(self, given: float) -> None:
        """Raise AccelkitError for a timestep that is in the run on another scale only.

        The direction of time cannot be checked this way: any number may be a step's mirror image,
        as in a sampling loop that draws its timesteps.
        """
        steps = self._run()
        if steps is None:
            return
        scheduled = self._backbone.scheduler_timestep
        read, span = scheduled(given), abs(scheduled(1.0) - scheduled(0.0))
        others = {n: (a, b) for n, (a, b) in TIMES.items() if abs(abs(span * a) - 1) > 0.5}
        names = {name: (given - b) / a for name, (a, b) in others.items()}
        fits = [n for n, t in names.items() if any(abs(s - t) <= 1e-2 * abs(s) for s in steps[1])]
        if fits and not any(abs(s - read) <= 1e-2 * abs(s) for s in steps[1]):
            raise AccelkitError(
                f"this {type(self._backbone.model).__name__} is given the timestep {given:g}, "
                f"which accelkit reads as its scheduler's {read:g}; read as {fits[0]} it would be "
                "one of the scheduler's steps. Register a backbone with its timestep_scale "
                "(accelkit.register_backbone), or call accelkit.disable"
            )

    def _unrounded(self, values: list[float], eps: float) -> list[float]:
        """Undo the rounding of half precision, as bfloat16 rounds 999 to 1000.

        A value that no timestep of the scheduler can have been rounded to stays as it is.
        """
        steps = self._steps()
        if steps is None:
            return values
        near = [min(steps[1], key=lambda s: abs(s - v)) for v in values]
        return [s if abs(s - v) <= eps * abs(v) else v for s, v in zip(near, values, strict=True)]

    def _run(self) -> tuple[Tensor, list[float]] | None:
        """Return the scheduler's timesteps if they were set for a sampling run."""
        if getattr(self._scheduler(), "num_inference_steps", None) is None:
            return None
        return self._steps()

    def _steps(self) -> tuple[Tensor, list[float]] | None:
        """Return the scheduler's timesteps as its tensor and as numbers."""
        steps = getattr(self._scheduler(), "timesteps", None)
        if not isinstance(steps, Tensor) or steps.ndim != 1 or not len(steps):
            return None
        version = -1 if steps.is_inference() else steps._version
        listed = self._listed  # read once, since another thread may replace it
        if listed is None or listed[0] is not steps or listed[1] != version:
            listed = self._listed = (steps, version, steps.tolist())
        return steps, listed[2]


def free_to_read(timestep: Tensor | float) -> bool:
    """Return whether one timestep holds for all samples and no GPU has to be waited for."""
    return isinstance(timestep, Tensor) and timestep.is_cpu and not any(timestep.stride())


def place_in(view: Tensor, whole: Tensor) -> int | None:
    """Return the index in the 1-D ``whole`` that a one-valued ``view`` shows, None for none."""
    same = (
        view.dtype == whole.dtype
        and view.device == whole.device
        and view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    )
    offset = int(view.storage_offset()) - int(whole.storage_offset())
    place, rest = divmod(offset, max(1, whole.stride(0)))
    return place if same and rest == 0 and 0 <= place < len(whole) else None


class PipelineScheduler:
    """The scheduler of a pipeline, which may be exchanged; the last known one once it is gone."""

    def __init__(self, pipeline: Any, scheduler: Any) -> None:
        self._owner = weakref.ref(pipeline)
        self._last = scheduler

    def __call__(self) -> Any:
        """Return the scheduler in use."""
        owner = self._owner()
        if owner is not None:
            self._last = owner.scheduler
        return self._last

    def copied(self, memo: dict[int, Any]) -> PipelineScheduler:
        """Return the getter of the pipeline's copy if the pipeline itself is being deep-copied."""
        twin = memo.get(id(self._owner()))  # memoised before its attributes are set
        return self if twin is None else PipelineScheduler(twin, self())


def scheduler_getter(target: Any, scheduler: Any) -> Callable[[], Any]:
    """Return a function that returns ``scheduler``, or if it is None the pipeline's, if any."""
    if scheduler is not None:
        return lambda: scheduler
    if isinstance(target, nn.Module) or getattr(target, "scheduler", None) is None:
        return lambda: None
    return PipelineScheduler(target, target.scheduler)
