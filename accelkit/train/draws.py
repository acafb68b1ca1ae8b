"""The random numbers of a training step, a function of the seed and the step alone.

A resumed run therefore needs no generator's state, and a batch does not depend on the number of
processes that share it: each one draws the whole batch (latents are small) and takes its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_ORDER, _STEP, _MODEL = 0, 1, 2  # keys of independent streams of random numbers


def generator(*keys: int) -> torch.Generator:
    """Return a CPU generator for a tuple of whole numbers; different tuples are independent."""
    return torch.Generator().manual_seed(_seed(*keys))


def seed_of_model(seed: int, step: int, rank: int) -> int:
    """Return the seed of a network's own draws, such as dropout, in a step on one process."""
    return _seed(seed, _MODEL, step, rank)


def _seed(*keys: int) -> int:
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]) >> 1


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, _ORDER, epoch))


@dataclass(frozen=True)
class Draw:
    """The draws of a step for a batch of B samples of shape S.

    Attributes:
        rows: indices of the samples, int64 (B,); every sample comes once an epoch.
        timestep: timesteps in the process's dtype, (B,).
        posterior: standard normal numbers for the autoencoder's posterior, float32 (B, *S).
        noise: standard normal noise, float32 (B, *S).
        drop: whether each sample's label is dropped, bool (B,).
        place: uniform numbers in [0, 1) for methods that draw one more, float32 (B,).
    """

    rows: Tensor
    timestep: Tensor
    posterior: Tensor
    noise: Tensor
    drop: Tensor
    place: Tensor

    def part(self, index: int, count: int) -> Draw:
        """Return every ``count``-th sample, starting at ``index``."""
        return Draw(**{name: value[index::count] for name, value in vars(self).items()})


def draw(
    seed: int,
    step: int,
    batch: int,
    *,
    size: int,
    shape: tuple[int, ...],
    timesteps: Callable[[int, torch.Generator], Tensor],
    dropout: float,
) -> Draw:
    """Return the draw of a 0-based ``step`` from a data set of ``size`` samples.

    Args:
        seed: seed of the run.
        step: number of the step.
        batch: number of samples to draw.
        size: number of samples in the data set.
        shape: shape of one sample.
        timesteps: function that draws a number of timesteps from a generator, such as
            :meth:`accelkit.noise.processes.ForwardProcess.draw`.
        dropout: share of samples whose label is dropped.
    """
    first = step * batch
    places = [divmod(first + i, size) for i in range(batch)]
    rows = torch.stack([_epoch(seed, epoch, size)[place] for epoch, place in places])
    rng = generator(seed, _STEP, step)
    return Draw(
        rows=rows,
        timestep=timesteps(batch, rng),
        posterior=torch.randn(batch, *shape, generator=rng),
        noise=torch.randn(batch, *shape, generator=rng),
        drop=torch.rand(batch, generator=rng) < dropout,
        place=torch.rand(batch, generator=rng),
    )
