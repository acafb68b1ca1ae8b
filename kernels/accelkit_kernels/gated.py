"""Gated residual: the output of a block's branch, weighted per feature, added to the stream.

For a token x of sample b and the branch's output y for it:

    h = x + gate[b] * y                Peebles & Xie 2023, section 3.2: adaLN-Zero's alpha

The kernel is for inference: where gradients are recorded, the PyTorch reference runs.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

import torch
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import CHUNK, HAS_TRITON, run, unit

__all__ = ["gated_residual", "gated_residual_reference"]

# ---------------------------------------------------------------------------- PyTorch reference


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """What `gated_residual` computes, in plain PyTorch; float64 is taken too, and kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + gate.to(wide)[:, None] * y.to(wide)).to(x.dtype)


# ------------------------------------------------------------------------------- Triton kernel

# Nothing is reduced over the features, so a program takes a block of them and no width is too
# large. The widths of DiT are multiples of 128, so that no lane is idle.
WIDTH = 128

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        h_ptr, x_ptr, y_ptr, gate_ptr,
        N, D, x_b, x_n, y_b, y_n, gate_b,
        WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """One program per CHUNK tokens of one sample and WIDTH features."""
        chunks = tl.cdiv(N, CHUNK)
        b = (tl.program_id(0) // chunks).to(tl.int64)
        token = (tl.program_id(0) % chunks) * CHUNK + tl.arange(0, CHUNK)[:, None].to(tl.int64)
        col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        mask = (token < N) & (col < D)[None, :]

        gate = tl.load(gate_ptr + b * gate_b + col, col < D, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + b * x_b + token * x_n + col[None, :], mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * y_b + token * y_n + col[None, :], mask, other=0.0).to(tl.float32)
        h = x + gate[None, :] * y
        tl.store(h_ptr + (b * N + token) * D + col[None, :], h.to(h_ptr.dtype.element_ty), mask)


def _forward_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    x, y, gate = unit(x), unit(y), unit(gate)
    B, N, D = x.shape
    h = x.new_empty(B, N, D)
    with torch.cuda.device_of(x):
        _forward_kernel[(B * triton.cdiv(N, CHUNK), triton.cdiv(D, WIDTH))](
            h, x, y, gate,
            N, D, x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0),
            WIDTH=WIDTH, CHUNK=CHUNK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return h


# ------------------------------------------------------------------------------ public function


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * y`, with a gate for each sample.

    Runs the Triton kernel on CUDA tensors, and the PyTorch reference elsewhere and where gradients
    are recorded. `torch.compile` keeps it whole.

    Args:
        x: tokens (B, N, D), float32, bfloat16 or float16, of any strides.
        y: (B, N, D), dtype and device of `x`.
        gate: (B, D), dtype and device of `x`.

    Returns:
        (B, N, D), contiguous, in the dtype of `x`; computed in float32.

    Raises:
        ValueError: a shape or device does not match.
        TypeError: an input is not a tensor, or its dtype is not supported or not that of `x`.

    Source: adaLN-Zero of DiT (Peebles & Xie 2023, section 3.2).
    """
    _common.check_tensors(x=x, y=y, gate=gate)
    _common.check_tokens(x)
    _common.check_like(x, {"y": y}, "(B, N, D)", x.shape)
    _common.check_like(x, {"gate": gate}, "(B, D)", (x.shape[0], x.shape[2]))
    if _common.records_gradients(x, y, gate):
        return gated_residual_reference(x, y, gate).contiguous()
    return _gated_residual(x, y, gate)


@torch.library.custom_op("accelkit::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    kernel, reference = _forward_triton, gated_residual_reference
    return run("gated_residual", kernel, reference, x, y, gate).contiguous()


@_gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)
