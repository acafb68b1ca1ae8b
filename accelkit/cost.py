"""The cost of a network call, counted by torch on a twin without weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from accelkit.backbones import Backbone
from accelkit.backbones.example import Design, call
from accelkit.compute import Compute
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.runtime.switch import enable
from accelkit.schedule import Schedule
from accelkit.subject import Subject


def macs_by_depth(model: nn.Module) -> list[int]:
    """Return the multiply-accumulates of one call on one sample, from the least depth to the full.

    Counted with ``torch.utils.flop_counter`` (two flops are one MAC; matrix products, convolutions
    and attention, not element-wise work) for the sample that :meth:`Backbone.example` makes up. A
    skipped block counts with the part of it that still runs, e.g. a U-ViT's skip projection.

    Raises:
        AccelkitError: a call of the model cannot be made up, or not without weights.
    """
    return list(_by_depth(Design.of(model), "macs"))


def parameters_by_depth(model: nn.Module) -> list[int]:
    """Return how many parameters one call reads, from the least depth to the full.

    Counted in the same call as :func:`macs_by_depth`, in the modules that run; embedding tables
    count as a whole.

    Raises:
        AccelkitError: as :func:`macs_by_depth`.
    """
    return list(_by_depth(Design.of(model), "parameters"))


def macs(model: nn.Module, compute: Compute) -> int:
    """Return the multiply-accumulates of one call that spends ``compute``, as macs_by_depth."""
    return _count(Design.of(model), compute).macs.total


def ideal_saving(
    model: nn.Module | Subject, schedule: Schedule, timesteps: Iterable[float] | None = None
) -> float:
    """Return the share of a full call's cost that ``schedule`` saves on ``model``, from 0 to 1.

    If every block is counted, all are alike and no knob is set, it is the share of blocks left
    out, as in published figures. Otherwise it is the share of multiply-accumulates. If these cannot
    be counted, it is the share of counted blocks, and AccelkitWarning says so.

    Args:
        model: the network or its subject.
        schedule: a schedule for its depth.
        timesteps: as for :meth:`Schedule.mean`.
    """
    subject = Subject.of(model)
    if schedule.full or (_alike(subject.backbone) and schedule.plain):
        return schedule.ideal_saving(timesteps)
    try:
        return schedule.ideal_saving(timesteps, cost_of(subject))
    except AccelkitError as error:
        warnings.warn(
            f"the ideal saving is given as the share of counted blocks: {error}",
            AccelkitWarning,
            stacklevel=2,
        )
        return schedule.ideal_saving(timesteps)


def cost_of(model: nn.Module | Subject) -> Callable[[Compute], int]:
    """Return a function from a Compute to the multiply-accumulates of a call that spends it."""
    subject = Subject.of(model)
    costs, full = macs_by_depth(subject.model), subject.backbone.depth
    return lambda spent: (
        macs(subject.model, spent) if spent.knobs else costs[spent.depth - full - 1]
    )


def parameters_of(model: nn.Module | Subject) -> Callable[[Compute], int]:
    """Return a function from a Compute to the number of parameters that such a call reads."""
    subject = Subject.of(model)
    counts, full = parameters_by_depth(subject.model), subject.backbone.depth
    return lambda spent: counts[spent.depth - full - 1]


def _alike(backbone: Backbone) -> bool:
    sizes = {sum(p.numel() for p in block.parameters()) for block in backbone.blocks}
    return len(sizes) == 1 and len(backbone.all_blocks) == backbone.depth


class _Count(NamedTuple):
    """A count of a whole call and of each counted block in it."""

    total: int
    blocks: list[int]


class _Counts(NamedTuple):
    macs: _Count
    parameters: _Count


@lru_cache(maxsize=16)
def _by_depth(design: Design, quantity: str) -> tuple[int, ...]:
    backbone = Subject.of(design.twin()).backbone
    least, depth = backbone.least, backbone.depth
    ran, skipped = (getattr(_count(design, Compute(d)), quantity) for d in (depth, least))
    totals = [ran.total]
    for i in reversed(range(least, depth)):  # a block costs the same whichever others run
        totals.insert(0, totals[0] - ran.blocks[i] + skipped.blocks[i])
    return tuple(totals)


@lru_cache(maxsize=64)
def _count(design: Design, compute: Compute) -> _Counts:
    subject = Subject.of(design.twin())
    twin, backbone = subject.model, subject.backbone
    backbone.restore()
    counter = FlopCounterMode(display=False)
    flops = [0] * backbone.depth
    read: dict[nn.Parameter, int] = {}  # sizes of the parameters that the call reads

    def watch(index: int, block: nn.Module) -> None:
        def begin(*_: Any) -> None:
            flops[index] -= counter.get_total_flops()

        def end(*_: Any) -> None:
            flops[index] += counter.get_total_flops()

        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)

    for index, block in enumerate(backbone.blocks):
        watch(index, block)
    given = backbone.example()
    schedule = Schedule((1.0,), (compute,), backbone.depth)
    try:
        with enable(subject, schedule, kernels="off"), counter, torch.no_grad():
            for module in set(twin.modules()) - set(backbone.blocks[compute.depth :]):
                own = {p: p.numel() for p in module.parameters(recurse=False)}
                module.register_forward_hook(lambda *_, own=own: read.update(own))
            call(twin, given, "meta")
    except AccelkitError:
        raise
    except Exception as error:  # anything that a network does with values it does not have
        reason = str(error).strip().partition("\n")[0][:100]
        raise AccelkitError(
            f"the cost of a {type(twin).__name__} cannot be counted without its weights ({reason})"
        ) from error
    return _Counts(
        _Count(counter.get_total_flops() // 2, [count // 2 for count in flops]),
        _Count(
            sum(read.values()),
            [sum(read.get(p, 0) for p in block.parameters()) for block in backbone.blocks],
        ),
    )
