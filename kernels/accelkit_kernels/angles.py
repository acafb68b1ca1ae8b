"""Angles for `qk_norm_rope` on a grid of tokens, as tables of cosines and sines.

The first half of the d / 2 angles grows with the token's row, the second with its column:

    a_j = row * theta^(-4j / d)             for j < d / 4, Lu et al. 2024 (FiT), section 3.2
    a_{j + d / 4} = column * theta^(-4j / d)
"""

import torch
from torch import Tensor

__all__ = ["rotary_2d"]


def rotary_2d(
    rows: int,
    columns: int,
    head_dim: int,
    theta: float = 10_000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines for a grid of tokens, row by row: float32 (N, head_dim / 2).

    Raises:
        ValueError: head_dim is not a multiple of four, or a size is not positive.
    """
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}, expected a multiple of 4: two axes of pairs")
    if rows < 1 or columns < 1:
        raise ValueError(f"the grid is {rows} x {columns}, expected at least 1 x 1")
    frequency = theta ** (-torch.arange(0, head_dim, 4, dtype=torch.float64) / head_dim)
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)
    angle = torch.cat([torch.outer(row, frequency), torch.outer(column, frequency)], dim=1)
    return angle.cos().to(device, torch.float32), angle.sin().to(device, torch.float32)
