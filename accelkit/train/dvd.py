"""Simultaneous supervision of depth-varying diffusion: a target for every part on the way.

A sample of noise level t runs the parts up to its own. The last one learns the prediction y itself;
an earlier part i learned, on its own noisier samples, to predict y from x_s with s in its interval.
To first order, and with the gradient taken as the identity, the same blocks return for x_t

    y + (x_t - x_s),    x_t = a_t x_0 + b_t eps,

which is the earlier part's target; s is matched to t. For noise prediction, y = eps, that is the
paper's k x_0 + (1 - m) eps with k = sqrt(abar_t) - sqrt(abar_s), m = sqrt(1 - abar_s)
- sqrt(1 - abar_t). On the straight path x_t - x_s = -(s - t)(eps - x_0), times in [0, 1], and the
velocity y = eps - x_0 only shrinks: the target is (1 - (s - t)) (eps - x_0). Other predictions
follow alike, each y being the one at s.

Which timestep s of its interval an earlier part is matched to, the paper leaves open:

- ``nearest``: the interval's end on the side of the data, as near to the sample as it gets. The
  expansion's error is least there, and the part's target is one continuous function of the noise
  level, which meets the part's own prediction where its interval begins. So this is the default.
- ``relative``: as far into its interval as the sample is into its own.
- ``middle``: the interval's middle.
- ``random``: drawn uniformly from the interval.

Every exit is given the sample's own timestep and condition, and uses the network's one head, as no
parameters are added; :mod:`accelkit.train.heads` has the other way. The variance of a network that
learns one is trained at the sample's own exit alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.processes import ForwardProcess
from accelkit.runtime.taps import Tap, check
from accelkit.schedule import Schedule
from accelkit.train import heads
from accelkit.train.config import TrainConfig


def intermediate_target(
    process: ForwardProcess, x0: Tensor, eps: Tensor, t: Tensor, matched: Tensor
) -> Tensor:
    """Return what an earlier part is to predict for x_t, shaped as ``x0`` (B, C, ...).

    Args:
        process: the forward process.
        x0, eps: (B, C, ...), data and noise.
        t: (B,) timesteps of the samples.
        matched: (B,) timesteps s in the earlier part's interval.
    """
    step = process.add_noise(x0, eps, t) - process.add_noise(x0, eps, matched)
    return process.target(x0, eps, matched) + step


def parts_of(schedule: Schedule) -> list[int]:
    """Return the depth of each part, from data to noise; AccelkitError if they do not fall."""
    depths = [compute.depth for compute in schedule.computes]
    if len(depths) < 2 or any(a <= b for a, b in pairwise(depths)):
        raise AccelkitError(
            "supervising parts on the way needs at least two depths that fall from data to noise; "
            f"{schedule.name or schedule} runs {', '.join(map(str, depths))}"
        )
    return depths


class Supervision:
    """The intermediate losses of a schedule.

    Args:
        schedule: its intervals are the parts.
        axis: places the process's timesteps on the schedule's noise axis.
        process: the forward process.
        match: one of :data:`accelkit.train.config.MATCHES`.

    Attributes:
        bounds: (n + 1,) float64, where the n intervals begin and the last one ends, in timesteps.

    Raises:
        AccelkitError: the depth does not fall all the way from data to noise, or an interval has no
            timestep of the process.
    """

    def __init__(
        self, schedule: Schedule, axis: NoiseAxis, process: ForwardProcess, match: str = "nearest"
    ) -> None:
        self.depths, self.process, self.match = parts_of(schedule), process, match
        low, high = process.span
        starts = [low, *(_first(axis, process, edge) for edge in schedule.edges[:-1])]
        self.bounds = torch.tensor([*starts, high], dtype=torch.float64)
        if empty := [i for i, (a, b) in enumerate(pairwise(self.bounds.tolist())) if a >= b]:
            edges = (0.0, *schedule.edges)
            raise AccelkitError(
                f"{schedule.name or schedule} has a part for noise levels {edges[empty[0]]:g} to "
                f"{edges[empty[0] + 1]:g}, which no timestep of this process ({axis.kind}) has; "
                "give depths at other edges"
            )

    def matched(self, depth: int, t: Tensor, place: Tensor) -> Tensor:
        """Return the timestep s of each sample (B,), in the interval that runs ``depth`` blocks.

        Args:
            depth: one of the schedule's, below the samples' own.
            t: (B,), the samples' timesteps.
            place: (B,) in [0, 1), where in the interval if that is random.
        """
        bounds, part = self.bounds.to(t.device), self.depths.index(depth)
        start, width = bounds[part], bounds[part + 1] - bounds[part]
        exact = t.double()
        if self.match == "relative":
            own = torch.bucketize(exact, bounds[1:-1], right=True)
            along = (exact - bounds[own]) * width / (bounds[own + 1] - bounds[own])
        elif self.match == "random":
            along = place.to(exact) * width
        else:
            along = torch.zeros_like(exact) + (width / 2 if self.match == "middle" else 0)
        where = start + along
        return (where.floor() if self.process.whole else where).to(t.dtype)

    def losses(
        self, taps: Sequence[Tap], x0: Tensor, eps: Tensor, t: Tensor, place: Tensor
    ) -> Tensor:
        """Return the sum of each sample's intermediate losses, shape (B,), float32.

        Every one is a mean squared error; of a learned variance's channels nothing is asked.

        Args:
            taps: predictions on the way, (n, C or 2C, ...) in the layout of ``x0``.
            x0, eps: (B, C, ...), data and noise.
            t: (B,), the samples' timesteps.
            place: (B,) in [0, 1), as in :meth:`matched`.
        """
        total = torch.zeros(len(x0), device=x0.device)
        for tap in taps:
            rows = tap.rows
            s = self.matched(tap.depth, t[rows], place[rows])
            target = intermediate_target(self.process, x0[rows], eps[rows], t[rows], s)
            predicted = tap.output[:, : x0.shape[1]].float()
            total = total.index_add(0, rows, (target - predicted).square().flatten(1).mean(1))
        return total


def supervision_for(
    config: TrainConfig,
    backbone: Backbone,
    schedule: Schedule,
    scheduler: Any,
    process: ForwardProcess,
) -> Supervision | None:
    """Return what a run adds to its losses on the way, None if its weight is 0.

    Raises:
        AccelkitError: the schedule, the model or the process allows none.
    """
    if not config.intermediate_weight:
        return None
    check(backbone, schedule)
    if config.intermediate_head == "own":
        heads.check(backbone)
    return Supervision(schedule, NoiseAxis.of(scheduler), process, config.intermediate_match)


def _first(axis: NoiseAxis, process: ForwardProcess, level: float) -> float:
    """Return the process's first timestep of at least a noise level, by bisection."""
    low, high = process.span
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (low, middle) if axis.level(middle) >= level else (middle, high)
    return math.ceil(high) if process.whole else high
