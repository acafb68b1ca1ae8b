"""The scheduler in use, and a network's timesteps read as the scheduler's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


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
    """Return a function that returns the scheduler in use for ``target``, or None.

    Args:
        target: a pipeline or a network.
        scheduler: the user's own choice, None for the pipeline's.
    """
    if scheduler is not None:
        return lambda: scheduler
    if isinstance(target, nn.Module) or getattr(target, "scheduler", None) is None:
        return lambda: None
    return PipelineScheduler(target, target.scheduler)
