"""The vectors that condition the blocks, computed once for each distinct condition.

A DiT's blocks are modulated by vectors that depend only on the timestep and label of a sample. A
batch has few distinct pairs of those: usually one timestep, and under guidance the same label, the
null class, in half of its rows. A sampling run repeats the labels at every step, so that the
vectors of all its steps can be computed in one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from accelkit.backbones import stale

LIMIT = 256 * 2**20
"""Largest table in bytes. 50 steps of DiT-XL/2 in bfloat16 with 8 labels and the null class take
176 MB; those of the built-in model in float32 with 10 labels and the null class take 24 MB."""


@dataclass(frozen=True)
class Modulations:
    """Vectors of width D that modulate samples, R for each distinct condition.

    Attributes:
        table: (P, R, D).
        index: (B,), int64, the row of the table for each sample. None if the table has one row for
            each sample, or one for all.
    """

    table: Tensor
    index: Tensor | None = None

    def of_each(self, samples: int) -> Modulations:
        """Return a table with a row for every sample."""
        table = self.table if self.index is None else self.table[self.index]
        return Modulations(table.expand(samples, -1, -1).contiguous())

    def take(self, start: int, stop: int, samples: int) -> tuple[Tensor, ...]:
        """Return some of the vectors for the first samples: (samples, D) each, (1, D) if shared."""
        part = self.table[:, start:stop]
        if self.index is not None:
            part = part[self.index[:samples]]
        elif part.shape[0] > samples:
            part = part[:samples]
        return part.unbind(1)


class Distinct:
    """Finds the distinct conditions of a batch.

    The labels of a sampling run are the same tensor at every step. On a GPU reading them would wait
    for the device, so that only the first step does, and later ones rely on
    :mod:`accelkit.backbones.stale`.

    Attributes:
        repeated: whether the last call had one timestep, and the labels of the call before.
    """

    def __init__(self) -> None:
        self.repeated = False
        self._seen: tuple[Tensor, stale.Seen] | None = None
        self._found: tuple[Tensor, Tensor] | None = None

    def __call__(self, timestep: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return timesteps (P,) and labels (P,) of the distinct pairs, and the pair of each sample.

        Args:
            timestep: (B,) or (1,).
            labels: (B,) or (1,).

        Returns:
            The third is (B,), int64; None if all samples have the same pair.
        """
        self.repeated = False
        # An expanded timestep is known to be one without waiting for a GPU.
        if not any(timestep.stride()) or _one(timestep):
            values, index = self._labels(labels)
            return timestep[:1].expand(len(values)), values, index if len(values) > 1 else None
        pairs = torch.stack([timestep.double(), labels.expand(len(timestep)).double()], dim=1)
        pairs, index = torch.unique(pairs, dim=0, return_inverse=True)  # exact: far below 2^53
        times, classes = pairs[:, 0].to(timestep.dtype), pairs[:, 1].to(labels.dtype)
        return times, classes, index if len(pairs) > 1 else None

    def _labels(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        tracked = labels.is_cuda and not labels.is_inference()
        if tracked and self._seen is not None and self._found is not None:
            known, seen = self._seen
            if known is labels and seen.same():
                self.repeated = True
                return self._found
        found = torch.unique(labels, return_inverse=True)
        self._seen = (labels, stale.writes([labels])) if tracked else None
        if self._found is not None and labels.is_cpu and self._found[0].is_cpu:
            self.repeated = all(map(torch.equal, found, self._found))
        if not self.repeated:
            self._found = found
        return self._found  # type: ignore[return-value]


def _one(timestep: Tensor) -> bool:
    return len(timestep) == 1 or (len(timestep) > 0 and bool((timestep == timestep[0]).all()))


class StepTable:
    """Vectors of all steps of a sampling run, kept for as long as the run lasts.

    Calls belong to one run while timesteps and labels are the same tensors and the steps advance.
    The first two calls of a run do without a table, so that calls with new labels each time never
    pay for one. The third call always makes the table. Its rows may differ by rounding from
    vectors computed alone, so a fixed rule keeps a run independent of earlier runs. Weights written
    to through ``.data`` take effect with the next run, or with a repeated step, which is also
    computed alone.

    Attributes:
        bytes: size of the table, 0 without one.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._run: tuple[Any, ...] = ()
        self._seen: stale.Seen | None = None
        self._table: Tensor | None = None
        self._place = -1
        self._calls = 0  # of the run

    def at(
        self,
        run: tuple[Any, ...],
        sources: list[Tensor],
        place: int,
        size: int,
        make: Callable[[], Tensor],
    ) -> Tensor | None:
        """Return a step's part of the run's table; None at the first two calls, or if too large.

        Args:
            run: objects whose identities define the run.
            sources: tensors that the table is made from.
            place: index of the step in the run.
            size: bytes that the table would take.
            make: returns the table, with a row for every step.
        """
        same = len(run) == len(self._run) and all(map(is_, run, self._run))
        same = same and place >= self._place  # otherwise the run has begun again
        again, self._place = place == self._place, place
        if not same or self._seen is None or not self._seen.same():
            self._run, self._table, self.bytes = run, None, 0
            self._seen = stale.writes(sources)
            self._calls = 0
        self._calls += 1
        if self._calls < 3 or again or size > LIMIT:
            return None
        if self._table is None:
            self._table, self.bytes = make(), size
        return self._table[place]
