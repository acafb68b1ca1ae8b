"""Decides, from a call's timesteps, which blocks each of its samples runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from accelkit.backbones import Backbone
from accelkit.compute import Compute
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.runtime import conflicts, recording
from accelkit.runtime.timesteps import Timesteps, free_to_read
from accelkit.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """What one pass over the blocks runs.

    Attributes:
        depth: blocks run by the deepest sample.
        active: rows that run each block, never rising; None if all samples are equally deep.
        merge: index of the way of merging tokens in the schedule's ``merges``, None for none. Not
            the ratio, which a compiled graph would take for an input although it decides shapes.
        grad: whether the pass records gradients.
        grid: height and width of the map of tokens, for a schedule that merges some.
    """

    depth: int
    active: tuple[int, ...] | None
    merge: int | None
    grad: bool
    grid: tuple[int, int] | None = None

    def rows_at(self, index: int) -> int | None:
        """Return how many rows run block ``index``, None for all."""
        if index >= self.depth:
            return 0
        return None if self.active is None else self.active[index]


@dataclass(frozen=True)
class PlannedPass:
    """A pass over the blocks that a call is to make.

    Attributes:
        plan: what the pass runs.
        rows: rows of the batch that it takes, in this order; None for the whole batch as it is.
        timestep: the scheduler's timestep of all samples of the call; None if they have several, or
            if reading it would wait for a GPU.
    """

    plan: Plan
    rows: Tensor | None = None
    timestep: float | None = None


@dataclass(eq=False)
class RunningPass:
    """A pass under way: its plan, and what its hooks hand on to each other.

    Attributes:
        plan: what the pass runs.
        recomputed: whether gradient checkpointing runs one of its blocks again, rather than the
            model its forward.
        exited: hidden states of the rows that left the batch, by the index of the first block
            that they skip.
        shortcut: computes the effect of all skipped blocks at once; None where each of them
            computes its own (:meth:`accelkit.backbones.Backbone.shortcut`).
        skipped: arguments of the blocks that the shortcut stands for.
        tapped: index and arguments of the blocks that the taps were shown.
        exit_input: hidden states that only the exit runs on, None in a pass over the blocks.
    """

    plan: Plan
    recomputed: bool = False
    exited: dict[int, Tensor] = field(default_factory=dict)
    shortcut: Callable[[list[dict[str, Any]]], Any] | None = None
    skipped: list[dict[str, Any]] = field(default_factory=list)
    tapped: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    exit_input: Tensor | None = None


class _Running(threading.local):
    """The passes under way in a thread, the innermost last.

    The list is created once per thread and then only appended to and popped from: torch.compile
    carries that over a graph break, but loses an attribute that is set.
    """

    def __init__(self) -> None:
        self.stack: list[RunningPass] = []


class Router:
    """Decides for each call, from its timesteps, how deep each sample goes.

    Args:
        backbone: the model.
        schedule: what to spend at which noise level.
        scheduler: returns the scheduler in use, None for the reference process. Called for every
            call of the model, since a pipeline's scheduler may be exchanged.
        axis: the noise axis of the scheduler at present, if it is known.

    Attributes:
        taps: the :class:`accelkit.runtime.taps.Taps` in force, if any.
        fused: the model's fused forward (:mod:`accelkit.runtime.fused`), if it has one.
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
        self.scheduler = scheduler
        self.timesteps = Timesteps(backbone, scheduler)
        self.taps: Any = None
        self.fused: Any = None
        self._plans = WeakTensorKeyDictionary()  # by the input of blocks that may be recomputed
        self._axis: tuple[Any, NoiseAxis] | None = None if axis is None else (scheduler(), axis)
        self._running = _Running()

    @property
    def axis(self) -> NoiseAxis:
        """The noise axis of the scheduler in use."""
        scheduler, known = self.scheduler(), self._axis  # another thread may replace them
        if known is None or known[0] is not scheduler:
            known = self._axis = (scheduler, NoiseAxis.of(scheduler))
        return known[1]

    @property
    def running(self) -> RunningPass | None:
        """The pass under way in this thread, the innermost of nested ones."""
        stack = self._running.stack
        return stack[-1] if stack else None

    def run(
        self, running: RunningPass, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return what ``forward`` returns, with ``running`` as the pass under way."""
        stack = self._running.stack
        stack.append(running)
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
    ) -> list[PlannedPass]:
        """Plan a call of ``batch`` samples.

        Args:
            timestep: one value, or one per sample, as the model is given it.
            batch: number of samples.
            narrows: whether samples can leave the batch on the way, so that one pass serves mixed
                depths.
            grid: height and width of the map of tokens, for a schedule that merges some.
        """
        grad = torch.is_grad_enabled()

        def plan(compute: Compute, active: tuple[int, ...] | None = None) -> Plan:
            merge = None if compute.merge is None else self.schedule.merges.index(compute.merge)
            return Plan(compute.depth, active, merge, grad, grid)

        computes, values = self.schedule.computes, None
        varies = len(computes) > 1 and batch > 0
        # With one depth only the fused forward has a use for the timestep.
        helps = self.fused is not None and batch > 0 and not varies and not recording.by()
        if varies or (helps and free_to_read(timestep)):
            values = self.timesteps.read(timestep)
        spent = [computes[0]]
        if varies and values is not None:
            spent = [self.schedule.at(self.axis.level(t)) for t in values]
        kinds = list(dict.fromkeys(spent))
        if len(kinds) == 1:
            single = values[0] if values is not None and len(values) == 1 else None
            return [PlannedPass(plan(spent[0]), timestep=single)]
        if len(spent) != batch:
            raise AccelkitError(
                f"got {len(spent)} timesteps for a batch of {batch}; give one, or one per sample"
            )
        if not narrows or len({replace(c, depth=0) for c in kinds}) > 1:
            return [
                PlannedPass(plan(kind), torch.tensor([i for i, c in enumerate(spent) if c == kind]))
                for kind in kinds
            ]
        depths = [c.depth for c in spent]
        order = sorted(range(batch), key=lambda row: -depths[row])
        active = tuple(sum(d > i for d in depths) for i in range(max(depths)))
        index = None if order == list(range(batch)) else torch.tensor(order)
        return [PlannedPass(plan(spent[order[0]], active), index)]

    def pass_for_block(self, hidden: Tensor) -> RunningPass:
        """Return the pass that a block is run for on ``hidden``.

        Gradient checkpointing runs a block a second time on the same tensor object, in a backward:
        possibly in another thread, or while another call of the model is under way.
        """
        running, compiling = self.running, torch.compiler.is_compiling()
        backward = not compiling and torch._C._current_graph_task_id() != -1
        plan = self._plans.get(hidden) if running is None or backward else None
        if plan is not None and (running is None or plan is not running.plan):
            return RunningPass(plan, recomputed=True)
        if running is None:
            recording.refuse(self.schedule)
            if recording.by() == "torch.fx":
                raise AccelkitError(
                    "torch.fx traces the forward of the model's class, without the schedule of "
                    "this model; trace a module that calls the model"
                )
            conflicts.check(self.backbone, self.schedule)  # may name what removed the hook
            raise AccelkitError(
                "a block was run while no call of its model is under way: something took the "
                "schedule's hook off the model, or called the block by itself; call "
                "accelkit.disable"
            )
        if running.plan.grad and not torch.is_grad_enabled():
            raise AccelkitError(
                "a schedule cannot run inside reentrant gradient checkpointing, where gradients of "
                "samples that leave would be lost; enable it with use_reentrant=False"
            )
        if running.plan.grad and not compiling:
            self._plans[hidden] = running.plan
        return running
