"""The end of a U-ViT's decoder folded into one linear map.

A dropped decoder block keeps its ``skip_linear``: x <- A x + B s + c, for [A | B] its weight, c its
bias and s its long skip. A run of them up to the last block is the composition of such maps, and so
itself linear in x and all the skips at once:

    x_K = P_d x_d + sum_i P_(i+1) B_i s_i + sum_i P_(i+1) c_i,    P_i = A_(K-1) ... A_i,  P_K = 1

over the blocks i = d .. K - 1. That is one product with (k + 1) D^2 weights for a run of k blocks
in place of k products with 2 D^2 each, and exact but for rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from accelkit.backbones import stale

# Time of the fold over that of the chain, for runs of 1 to 6 on one core in float32 (D = 512, N =
# 257, medians of interleaved calls): 0.96, 0.73, 0.66, 0.62, 0.55, 0.59 for one sample and 1.06,
# 0.76, 0.75, 0.57, 0.52, 0.55 for eight. A run of one is the same product and is not folded.
LEAST_RUN = 2


@dataclass(frozen=True)
class Fold:
    """A run of skip projections as one linear map.

    Attributes:
        weight: (D, (k + 1) D), the columns for x first, then for each skip in the blocks' order.
        bias: (D,).
    """

    weight: Tensor
    bias: Tensor

    def fits(self, hidden_states: Tensor) -> bool:
        """Whether it has the dtype and device of the tokens."""
        like = (hidden_states.dtype, hidden_states.device)
        return (self.weight.dtype, self.weight.device) == like

    def __call__(self, hidden_states: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Return the output of the run for x and its k skips, each (B, N, D)."""
        return F.linear(torch.cat([hidden_states, *skips], dim=-1), self.weight, self.bias)


def fold(linears: Sequence[nn.Linear]) -> Fold:
    """Fold the skip projections of consecutive blocks, each with a weight (D, 2D) and a bias (D,).

    Half-precision weights are folded in float32 and rounded once, at the end. The result records no
    gradients and can be used in and out of inference mode.
    """
    last = linears[-1].weight
    dtype, device = torch.promote_types(last.dtype, torch.float32), last.device.type
    # A graph that torch.compile traces outside inference mode could not use inference tensors.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        after = torch.eye(len(last), dtype=dtype, device=last.device)
        bias = torch.zeros(len(last), dtype=dtype, device=last.device)
        columns: list[Tensor] = []
        for linear in reversed(linears):
            of_x, of_skip = linear.weight.to(dtype).chunk(2, dim=1)
            columns.insert(0, after @ of_skip)
            bias += after @ linear.bias.to(dtype)
            after = after @ of_x
        return Fold(torch.cat([after, *columns], dim=1).to(last.dtype), bias.to(last.dtype))


class FoldedSkips:
    """The folds of a decoder, one for each depth asked for, for as long as they are valid.

    Args:
        blocks: the decoder's blocks, each with a ``skip_linear``.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._blocks = blocks
        # Lists of a fixed length: torch.compile would retrace a graph if a dictionary gained a key.
        self._folds: list[Fold | None] = [None] * (len(blocks) + 1)
        self._seen: list[stale.Seen | None] = [None] * (len(blocks) + 1)
        self._sums: list[list[Tensor]] = [[] for _ in self._folds]
        self._compared: set[int] = set()  # depths whose sums were compared since the run began
        self._last = 0
        self._lock = threading.Lock()

    def at(self, depth: int) -> Fold | None:
        """Return the fold of all that follows the first ``depth`` blocks.

        It is made again if a weight was written to or replaced (:mod:`accelkit.backbones.stale`).
        Since fused optimisers and averages of weights write through ``.data``, the sums of rows are
        compared, too. On the CPU that is done at every call and takes 0.2 to 0.5 ms of a fold's
        13 ms (a run of 5, D = 512, two cores). On other devices, where the host would wait at each
        step, it is done once a sampling run. A smaller depth than
        before marks a new run. A run of constant depth has no such mark: call :meth:`clear` after
        writing through ``.data``.

        Returns:
            None if the chain of projections has to run: the run is shorter than ``LEAST_RUN``, a
            projection is more than a plain linear layer (adapters, quantisation, hooks), or its
            weights were made in inference mode, so that writes to them cannot be noticed.
        """
        with self._lock:
            return self._at(depth)

    def _at(self, depth: int) -> Fold | None:
        if depth < self._last:
            self._compared.clear()
        self._last = depth
        run: list[Any] = [block.skip_linear for block in list(self._blocks)[depth:]]
        if len(run) < LEAST_RUN or not all(map(_plain, run)):
            self._folds[depth] = None
        elif self._folds[depth] is None or not self._valid(depth, run):
            self._seen[depth] = stale.contents(run, "weight", "bias")
            self._folds[depth], self._sums[depth] = fold(run), _sums(run)
            self._compared.add(depth)
        return self._folds[depth]

    def made(self, depth: int) -> Fold | None:
        """Return the fold that :meth:`at` made last, unchecked; None if there is none."""
        return self._folds[depth]

    def clear(self) -> None:
        """Drop all folds."""
        with self._lock:
            self._folds = [None] * len(self._folds)

    def _valid(self, depth: int, run: Sequence[nn.Linear]) -> bool:
        """Whether the weights, and their sums if it is time to compare them, are as folded."""
        seen = self._seen[depth]
        if seen is None or not seen.of(run) or not seen.same():
            return False
        if depth in self._compared and not run[0].weight.is_cpu:
            return True
        self._compared.add(depth)
        return all(map(torch.equal, self._sums[depth], _sums(run)))


def _plain(linear: nn.Module) -> bool:
    """Whether a projection is a linear layer without hooks, whose weights can be watched."""
    if type(linear) is not nn.Linear or linear.bias is None:
        return False
    if "forward" in linear.__dict__ or linear._forward_hooks or linear._forward_pre_hooks:
        return False
    return not linear.weight.is_inference() and not linear.bias.is_inference()


@torch.no_grad()
def _sums(run: Sequence[nn.Linear]) -> list[Tensor]:
    """Return the sums of all rows, and the biases."""
    wide = torch.promote_types(run[0].weight.dtype, torch.float32)
    sums = [linear.weight.sum(1, dtype=wide) for linear in run]
    return [*sums, *(linear.bias.clone() for linear in run)]
