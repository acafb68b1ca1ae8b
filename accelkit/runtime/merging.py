"""Token merging: similar tokens of a map become one for a while, and are told apart again.

Pure tensor functions on tokens (B, N, D), of which the first may be protected and the others are a
map of height x width in rows. The first token of every 2 x 2 cell is a destination; each other
token finds the destination it is most similar to (cosine), and the most similar ones join theirs,
which becomes the mean (Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion"; Moon et
al. 2024 compare with it, tables 5 to 8). Nothing is drawn: equal similarities are settled in favour
of the earlier token, on every device, and a sample's matching depends on no other sample.

The authors' package tomesd is not used for the matching, though importing it would cost little: its
sorts are not stable, so equal similarities go as the backend likes; cells cut off by the edge of
the map get no destination, and a map one token wide fails; it protects no tokens; and it adds and
copies element by element, which a GPU does in no fixed order and a CPU slowly (matching, merging
and unmerging 4 x 256 tokens of width 1152 takes 34 ms of one core, here 5 ms). Where none of this
matters the two agree, but for what is compared: tomesd compares a block's input, this module is
given the attention's, which is normalised and modulated. Its last release is from 2023.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from accelkit.errors import AccelkitError


class Matching(NamedTuple):
    """Which tokens become one, for every sample of a batch.

    The merged sequence holds the tokens that stay alone, protected ones first, then the
    destinations.

    Attributes:
        order: numbers of all tokens (B, N): alone, destinations, and the R that are merged.
        target: which destination each of the R joins, counted from 0 (B, R).
        place: where in the merged sequence each token is found (B, N).
        destinations: how many there are.
    """

    order: Tensor
    target: Tensor
    place: Tensor
    destinations: int


def match(
    tokens: Tensor, grid: tuple[int, int], ratio: float, protected: int = 0
) -> Matching | None:
    """Decide which tokens are merged into which.

    Args:
        tokens: (B, N, D), floating; compared in float32, without gradients.
        grid: height and width of the map.
        ratio: share of the map's tokens that is merged, rounded down to whole tokens, and at most
            all but the destinations.
        protected: how many tokens stand before the map; they stay alone.

    Returns:
        The matching, None if no token is merged.

    Raises:
        AccelkitError: N is not ``protected`` and the map's together.
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

    A destination becomes the mean of itself and of those that join it, all weighing the same.
    """
    order, target, _, destinations = matching
    kept = order.shape[1] - target.shape[1]
    alone, first, joining = _rows(tokens, order).split(
        (kept - destinations, destinations, target.shape[1]), dim=1
    )
    # a product of matrices adds up in a fixed order, which scattered additions on a GPU do not
    joins = F.one_hot(target, destinations).to(tokens.dtype)  # (B, R, M)
    members = 1 + joins.sum(dim=1)[..., None]
    with _no_autocast(tokens.device):
        return torch.cat([alone, (first + joins.mT @ joining) / members], dim=1)


def unmerge(tokens: Tensor, matching: Matching) -> Tensor:
    """Return (B, N, D) of the merged (B, N - R, D): those that became one are all equal to it."""
    return _rows(tokens, matching.place)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leave products in the type that they are given; meta tensors have no autocast to turn off."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _rows(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Pick tokens (B, K, D) by their numbers (B, K) in each sample's own sequence."""
    batch, count, width = tokens.shape
    start = torch.arange(batch, device=tokens.device)[:, None] * count
    picked = tokens.reshape(-1, width).index_select(0, (numbers + start).flatten())
    return picked.view(batch, -1, width)
