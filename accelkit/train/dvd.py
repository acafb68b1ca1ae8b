"""Simultaneous supervision of depth-varying diffusion: a target for every exit a sample passes.

A sample of noise level t runs the parts up to its own. The last part learns the prediction y
itself; an earlier part i has learned, on its own noisier samples, to predict y from x_s with s in
its interval. To first order, and with the gradient taken as the identity, the same blocks return
for x_t

    y + (x_t - x_s),    x_t = a_t x_0 + b_t eps,

which is the earlier part's target; s is matched to t. For noise prediction, y = eps, that is the
paper's k x_0 + (1 - m) eps with k = sqrt(abar_t) - sqrt(abar_s), m = sqrt(1 - abar_s)
- sqrt(1 - abar_t). On the straight path x_t - x_s = -(s - t)(eps - x_0), times in [0, 1], and the
velocity y = eps - x_0 only shrinks: the target is (1 - (s - t)) (eps - x_0). Other predictions
work the same way; each y is the one at s.

The paper does not say which timestep s of its interval an earlier part is matched to:

- ``nearest``: the interval's end towards the data, as near to the sample as possible. The
  expansion's error is smallest there, and the part's target is a continuous function of the noise
  level that meets the part's own prediction at the start of its interval. This is the default.
- ``relative``: the same relative position in its interval as the sample has in its own.
- ``middle``: the interval's middle.
- ``random``: uniform over the interval.

Every exit is given the sample's own timestep and condition. The paper does not say either whether
the parts share their head; its parameter count, that of the baseline, suggests that they do. But
then a head has two targets at one timestep: the noise after all blocks, and another one after
fewer. :class:`OwnHeads` gives every earlier exit a head for the length of a training, so that the
parts share the blocks alone. A learned variance is trained at the sample's own exit alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.processes import ForwardProcess
from accelkit.runtime.taps import Tap, check
from accelkit.schedule import Schedule
from accelkit.train.config import TrainConfig


def intermediate_target(
    process: ForwardProcess, x0: Tensor, eps: Tensor, t: Tensor, matched: Tensor
) -> Tensor:
    """Return an earlier part's target for x_t, shaped as ``x0`` (B, C, ...).

    Args:
        process: the forward process.
        x0, eps: data and noise, (B, C, ...).
        t: timesteps of the samples, (B,).
        matched: timesteps s in the earlier part's interval, (B,).
    """
    step = process.add_noise(x0, eps, t) - process.add_noise(x0, eps, matched)
    return process.target(x0, eps, matched) + step


def parts_of(schedule: Schedule) -> list[int]:
    """Return the depth of each part, from data to noise.

    Raises:
        AccelkitError: the depths do not fall, or there is only one.
    """
    depths = [compute.depth for compute in schedule.computes]
    if len(depths) < 2 or any(a <= b for a, b in pairwise(depths)):
        raise AccelkitError(
            "intermediate losses need at least two depths that fall from data to noise; "
            f"{schedule.name or schedule} runs {', '.join(map(str, depths))}"
        )
    return depths


class Supervision:
    """The intermediate losses of a schedule.

    Args:
        schedule: the schedule, whose intervals are the parts.
        axis: the noise axis of the process.
        process: the forward process.
        match: ``intermediate_match`` of :class:`accelkit.train.config.TrainConfig`.

    Attributes:
        bounds: timesteps where the n intervals begin and the last one ends, float64 (n + 1,).

    Raises:
        AccelkitError: the depth does not fall all the way from data to noise, or the process has no
            timestep in one of the intervals.
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
            depth: a depth of the schedule, below those of the samples.
            t: timesteps of the samples, (B,).
            place: relative positions in the interval for a random match, (B,) in [0, 1).
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

        Each is a mean squared error of the prediction, without the channels of a learned variance.

        Args:
            taps: predictions at earlier exits, (n, C or 2C, ...) in the layout of ``x0``.
            x0, eps: data and noise, (B, C, ...).
            t: timesteps of the samples, (B,).
            place: relative positions as in :meth:`matched`, (B,) in [0, 1).
        """
        total = torch.zeros(len(x0), device=x0.device)
        for tap in taps:
            rows = tap.rows
            s = self.matched(tap.depth, t[rows], place[rows])
            target = intermediate_target(self.process, x0[rows], eps[rows], t[rows], s)
            predicted = tap.output[:, : x0.shape[1]].float()
            total = total.index_add(0, rows, (target - predicted).square().flatten(1).mean(1))
        return total


class OwnHeads(nn.Module):
    """Heads of earlier exits, copied from the network's head and kept outside the model.

    They last as long as a training: in sampling, a sample that exits there by its own noise level
    takes the network's head. A process's share of a batch may pass only some of the exits, which
    the distributed reducer cannot know, so :meth:`synchronize` averages their gradients.

    Args:
        backbone: backbone of the model, on the device of the training.
        depths: depths of the exits; all others use the network's head.
    """

    def __init__(self, backbone: Backbone, depths: Sequence[int]) -> None:
        super().__init__()
        paths = [name.rpartition(".") for name in _head_of(backbone)]
        self._places = [(backbone.model.get_submodule(parent), leaf) for parent, _, leaf in paths]
        self.at_depth = nn.ModuleDict(
            {
                str(depth): nn.ParameterList(
                    nn.Parameter(getattr(module, leaf).detach().clone())
                    for module, leaf in self._places
                )
                for depth in depths
            }
        )

    @contextmanager
    def used(self, depth: int) -> Iterator[None]:
        """Replace the network's head by that of a depth within the context."""
        if str(depth) not in self.at_depth:
            yield
            return
        shared = [getattr(module, leaf) for module, leaf in self._places]
        self._put(self.at_depth[str(depth)])  # type: ignore[arg-type]
        try:
            yield
        finally:
            self._put(shared)

    def synchronize(self, accelerator: Any) -> None:
        """Average the gradients over all processes; a missing one counts as 0."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = parameter.new_zeros(parameter.shape)
            parameter.grad = accelerator.reduce(parameter.grad, "mean")

    def _put(self, parameters: Iterable[nn.Parameter]) -> None:
        for (module, leaf), parameter in zip(self._places, parameters, strict=True):
            setattr(module, leaf, parameter)


def supervision_for(
    config: TrainConfig,
    backbone: Backbone,
    schedule: Schedule,
    scheduler: Any,
    process: ForwardProcess,
) -> Supervision | None:
    """Return the intermediate losses of a run, None if their weight is 0.

    Raises:
        AccelkitError: the schedule, the model or the process does not allow them.
    """
    if not config.intermediate_weight:
        return None
    check(backbone, schedule)
    if config.intermediate_head == "own" and not _head_of(backbone):
        raise AccelkitError(
            f"accelkit does not know the head of a {type(backbone.model).__name__}, so earlier "
            "exits cannot have their own; register a backbone that names its head, or train with "
            "--intermediate-head shared"
        )
    return Supervision(schedule, NoiseAxis.of(scheduler), process, config.intermediate_match)


def _first(axis: NoiseAxis, process: ForwardProcess, level: float) -> float:
    """Return the process's first timestep of at least a noise level, by bisection."""
    low, high = process.span
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (low, middle) if axis.level(middle) >= level else (middle, high)
    return math.ceil(high) if process.whole else high


def _head_of(backbone: Backbone) -> list[str]:
    """Return the names of the head's parameters, none if the head is not known."""
    within = tuple(f"{part}." for part in backbone.head)
    names = (name for name, _ in backbone.model.named_parameters())
    return [name for name in names if name in backbone.head or name.startswith(within)]
