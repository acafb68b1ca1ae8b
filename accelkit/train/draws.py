"""The random numbers of a step, as a function of the seed and the step alone.

So a resumed run needs no generator's state, and a batch is the same however many processes share
it: every process draws the whole batch (latents are small) and takes its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_ORDER, _STEP, _MODEL = 0, 1, 2  # what a stream of random numbers is for


def generator(*keys: int) -> torch.Generator:
    """Return a CPU generator for a tuple of whole numbers; different tuples are independent."""
    return torch.Generator().manual_seed(_seed(*keys))


def seed_of_model(seed: int, step: int, rank: int) -> int:
    """Return the seed of what a network itself draws in a step on one of several processes."""
    return _seed(seed, _MODEL, step, rank)


def _seed(*keys: int) -> int:
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]) >> 1


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, _ORDER, epoch))


@dataclass(frozen=True)
class Draw:
    """What a step draws for a batch of B samples of shape S.

    Attributes:
        rows: (B,) int64, which samples; every sample once an epoch.
        timestep: (B,) as the process draws them.
        posterior: (B, *S) float32, standard normal, for the autoencoder's posterior.
        noise: (B, *S) float32, standard normal.
        drop: (B,) bool, whose label is dropped.
        place: (B,) float32, uniform in [0, 1): what else a method has to draw.
    """

    rows: Tensor
    timestep: Tensor
    posterior: Tensor
    noise: Tensor
    drop: Tensor
    place: Tensor

    def part(self, index: int, count: int) -> Draw:
        """Return every ``count``-th sample from ``index`` on."""
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
        seed, step: what it is a function of, with the rest of these.
        batch: number of samples.
        size: samples of the data set.
        shape: of one sample.
        timesteps: draws as many timesteps as it is told from a generator, e.g.
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
