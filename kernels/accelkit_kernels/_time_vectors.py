"""Vectors that depend on the noise level, for time_norm.py, which gives the formulas.

A vector is given by four rows, (4, D): its values where a sigmoid is 1 and where it is 0, then the
slope and offset of the sigmoid's argument. A separate kernel interpolates once for each sample;
otherwise every program of the norm would read all four rows.
"""
# ruff: noqa: N803  (Triton's compile-time arguments keep their case)

import torch
from torch import Tensor

from accelkit_kernels._common import HAS_TRITON


def vectors_at(level: Tensor, vectors: Tensor) -> Tensor:
    """Return the vector at each sample's noise level, (B, D)."""
    high, low, slope, offset = vectors
    return low + torch.sigmoid(slope * level[:, None] + offset) * (high - low)


def vector_grads(
    sums: list[Tensor], level: Tensor, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dscale, dshift (empty without a shift) and dlevel from dgamma and dbeta (B, D)."""
    t = level.to(sums[0].dtype)
    dlevel = torch.zeros_like(t)
    grads = [scale, scale.new_empty(0)]
    for i, vectors in enumerate([scale] if shift is None else [scale, shift]):
        high, low, slope, offset = vectors.to(t.dtype)
        s = torch.sigmoid(slope * t[:, None] + offset)  # (B, D)
        dz = sums[i] * (high - low) * s * (1 - s)
        rows = [sums[i] * s, sums[i] * (1 - s), dz * t[:, None], dz]
        grads[i] = torch.stack([row.sum(0) for row in rows]).to(vectors.dtype)
        dlevel += (dz * slope).sum(1)
    return grads[0], grads[1], dlevel.to(level.dtype)


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _at_kernel(out_ptr, level_ptr, vectors_ptr, D, WIDTH: tl.constexpr):
        """One program per WIDTH features of one sample."""
        b = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        kept = col < D
        level = tl.load(level_ptr + b)
        high = tl.load(vectors_ptr + col, kept, other=0.0).to(tl.float32)
        low = tl.load(vectors_ptr + D + col, kept, other=0.0).to(tl.float32)
        slope = tl.load(vectors_ptr + 2 * D + col, kept, other=0.0).to(tl.float32)
        offset = tl.load(vectors_ptr + 3 * D + col, kept, other=0.0).to(tl.float32)
        out = low + tl.sigmoid(slope * level + offset) * (high - low)
        tl.store(out_ptr + b * D + col, out, kept)


def vectors_at_triton(level: Tensor, vectors: Tensor) -> Tensor:
    """Return `vectors_at` by the kernel, in float32."""
    B, D = level.shape[0], vectors.shape[1]
    out = vectors.new_empty(B, D, dtype=torch.float32)
    _at_kernel[(B, triton.cdiv(D, 256))](
        out, level.contiguous(), vectors.contiguous(), D, WIDTH=256, enable_fp_fusion=True
    )
    return out
