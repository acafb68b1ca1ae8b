"""What conditions the blocks, computed once for every distinct condition of a batch.

A DiT's blocks are modulated by vectors that depend on the timestep and label of a sample and on
nothing else of it. A batch has few distinct pairs of those: one timestep, as a rule, and under
guidance the same label, the null class, in half of its rows.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulations:
    """Vectors of width D by which samples are modulated, R for each distinct condition.

    Attributes:
        table: (P, R, D).
        index: (B,), int64: which row of the table is a sample's. None where the table has one for
            each of them, or one for all.
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

    The labels of a sampling run are the same tensor at every step. On a GPU, which would have to be
    waited for, only the first step looks at them: what is written to them later is noticed unless
    it goes through ``.data`` or a captured graph.

    Attributes:
        repeated: whether the last call had one timestep, and the labels of the call before.
    """

    def __init__(self) -> None:
        self.repeated = False
        self._seen: tuple[weakref.ref[Tensor], int] | None = None
        self._found: tuple[Tensor, Tensor] | None = None

    def __call__(self, timestep: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return timesteps (P,) and labels (P,) of the distinct pairs, and which each sample has.

        Args:
            timestep: (B,) or (1,).
            labels: (B,) or (1,).

        Returns:
            The third is (B,), int64; None where all samples have the same pair.
        """
        self.repeated = False
        # the former without waiting for a GPU; telling pairs apart would wait, too
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
            seen, version = self._seen
            if seen() is labels and version == labels._version:
                self.repeated = True
                return self._found
        found = torch.unique(labels, return_inverse=True)
        self._seen = (weakref.ref(labels), labels._version) if tracked else None
        if self._found is not None and labels.is_cpu and self._found[0].is_cpu:
            self.repeated = all(map(torch.equal, found, self._found))
        if not self.repeated:
            self._found = found
        return self._found  # type: ignore[return-value]


def _one(timestep: Tensor) -> bool:
    return len(timestep) == 1 or (len(timestep) > 0 and bool((timestep == timestep[0]).all()))
