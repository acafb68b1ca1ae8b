"""Token merging: similar tokens of a map are computed as one, and separated again afterwards.

Pure tensor functions on tokens (B, N, D): first the protected ones, if any, then a map of height x
width in rows. The first token of every 2 x 2 cell is a destination. Every other token finds the
destination that it is most similar to (cosine), and the most similar ones join theirs, which
becomes the mean (Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion"; Moon et al.
2024 compare with it, tables 5 to 8). The matching is deterministic: on every device the earlier of
two equally similar tokens wins, and a sample's matching depends on no other sample.

It agrees with the authors' package tomesd, whose sorts are not stable, which cannot protect tokens,
and which drops cells cut off by the edge of the map. Gathering rows instead of elements is also
faster: 4 x 256 tokens of width 1152 take 5 ms on one core, with tomesd 34 ms. One difference is in
use: tomesd compares a block's input, accelkit the normalised and modulated input of its attention.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from accelkit.errors import AccelkitError


class Matching(NamedTuple):
    """The tokens that are merged, for every sample of a batch.

    The merged sequence holds the tokens that stay alone, protected ones first, then the
    destinations.

    Attributes:
        order: (B, N), indices of all tokens: those alone, the destinations, and the R merged ones.
        target: (B, R), index of the destination that each merged token joins, from 0.
        place: (B, N), index of each token in the merged sequence.
        destinations: number of destinations.
    """

    order: Tensor
    target: Tensor
    place: Tensor
    destinations: int


def match(
    tokens: Tensor, grid: tuple[int, int], ratio: float, protected: int = 0
) -> Matching | None:
    """Match tokens to the destinations that they join.

    Args:
        tokens: (B, N, D), floating; compared in float32, without gradients.
        grid: height and width of the map.
        ratio: share of the map's tokens to merge, rounded down to whole tokens; at most all but the
            destinations.
        protected: number of tokens before the map, which stay alone.

    Returns:
        The matching, None if no token is merged.

    Raises:
        AccelkitError: N is not ``protected`` plus the size of the map.
    """
    (height, width), device, batch = grid, tokens.device, len(tokens)
    count = height * width
    if tokens.shape[1] != protected + count:
        raise AccelkitError(
            f"tokens are merged on a map of {height} x {width} behind {protected} others, got "
            f"{tokens.shape[1]} tokens"
        )
    destinations = -(-height // 2) * -(-width // 2)
    merged = min(int(ratio * count), count - destinations)
    if merged <= 0:
        return None
    with torch.no_grad(), _no_autocast(device):
        # 0 for the first token of every 2 x 2 cell
        inside = (torch.arange(height, device=device) % 2)[:, None] | (
            torch.arange(width, device=device) % 2
        )
        cells = inside.flatten().argsort(stable=True)
        first, others = cells[:destinations], cells[destinations:]
        unit = F.normalize(tokens[:, protected:].float(), dim=-1)
        similarity = unit[:, others] @ unit[:, first].mT  # (B, N - M, M)
        best, nearest = similarity.max(dim=-1)
        ranked = best.argsort(dim=1, descending=True, stable=True)
        joining, staying = ranked[:, :merged], ranked[:, merged:]
        target = nearest.gather(1, joining)
        map_order = (others[staying], first.expand(batch, -1), others[joining])
        order = torch.cat([protected + part for part in map_order], dim=1)
        front = torch.arange(protected, device=device).expand(batch, -1)
        order = torch.cat([front, order], dim=1)
        kept = order.shape[1] - merged
        own = torch.arange(kept, device=device).expand(batch, -1)
        places = torch.cat([own, kept - destinations + target], dim=1)
        place = torch.empty_like(order).scatter_(1, order, places)
    return Matching(order, target, place, destinations)


def merge(tokens: Tensor, matching: Matching) -> Tensor:
    """Return tokens (B, N, D) merged to (B, N - R, D).

    A destination becomes the mean of itself and the tokens that join it, with equal weights.
    """
    order, target, _, destinations = matching
    kept = order.shape[1] - target.shape[1]
    alone, first, joining = _rows(tokens, order).split(
        (kept - destinations, destinations, target.shape[1]), dim=1
    )
    # A matrix product adds in a fixed order; scattered additions on a GPU do not.
    joins = F.one_hot(target, destinations).to(tokens.dtype)  # (B, R, M)
    members = 1 + joins.sum(dim=1)[..., None]
    with _no_autocast(tokens.device):
        return torch.cat([alone, (first + joins.mT @ joining) / members], dim=1)


def unmerge(tokens: Tensor, matching: Matching) -> Tensor:
    """Return tokens (B, N, D) of merged ones (B, N - R, D); each merged token is its mean."""
    return _rows(tokens, matching.place)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Turn autocast off, so that products keep their type; meta tensors have no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _rows(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Return tokens (B, K, D) by their indices (B, K) in each sample's sequence."""
    batch, count, width = tokens.shape
    start = torch.arange(batch, device=tokens.device)[:, None] * count
    picked = tokens.reshape(-1, width).index_select(0, (numbers + start).flatten())
    return picked.view(batch, -1, width)
