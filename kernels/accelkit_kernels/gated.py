"""Gated residual: what a block's branch returns, weighed per feature, added to the stream.

For a token x of sample b and the branch's output y for it:

    h = x + gate[b] * y                Peebles & Xie 2023, section 3.2: adaLN-Zero's alpha

and backwards, with dh the gradient of h:

    dx = dh
    dy = gate[b] * dh
    dgate[b] = sum of dh * y over the tokens
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from typing import Any

import torch
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import CHUNK, HAS_TRITON, run, sum_chunks, unit

__all__ = ["gated_residual", "gated_residual_reference"]

# ---------------------------------------------------------------------------- PyTorch reference


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """What `gated_residual` computes, in plain PyTorch; float64 is taken too, and kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + gate.to(wide)[:, None] * y.to(wide)).to(x.dtype)


def _backward_reference(y: Tensor, dh: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(y.dtype, torch.float32)
    dy = dh.to(wide) * gate.to(wide)[:, None]
    dgate = (dh.to(wide) * y.to(wide)).sum(1)
    return dy.to(y.dtype), dgate.to(y.dtype)


# ------------------------------------------------------------------------------- Triton kernels

# Nothing is reduced over the features, so a program takes a block of them and no width is too
# large: 128, of which the widths of DiT are multiples, so that no lane is idle.
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

    @triton.jit
    def _backward_kernel(
        dy_ptr, partial_ptr, dh_ptr, y_ptr, gate_ptr,
        N, D, dh_b, dh_n, y_b, y_n, gate_b,
        WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """The same tile: its dy, and its part of dgate."""
        chunks = tl.cdiv(N, CHUNK)
        b = (tl.program_id(0) // chunks).to(tl.int64)
        chunk = tl.program_id(0) % chunks
        token = chunk * CHUNK + tl.arange(0, CHUNK)[:, None].to(tl.int64)
        col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        mask = (token < N) & (col < D)[None, :]

        gate = tl.load(gate_ptr + b * gate_b + col, col < D, other=0.0).to(tl.float32)
        dh_at = dh_ptr + b * dh_b + token * dh_n + col[None, :]
        dh = tl.load(dh_at, mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * y_b + token * y_n + col[None, :], mask, other=0.0).to(tl.float32)
        dy = dh * gate[None, :]
        tl.store(dy_ptr + (b * N + token) * D + col[None, :], dy.to(dy_ptr.dtype.element_ty), mask)
        out = partial_ptr + (b * chunks + chunk) * D + col  # partial: (B, chunks, 1, D)
        tl.store(out, tl.sum(dh * y, axis=0), col < D)


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


def _backward_triton(y: Tensor, dh: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    y, dh, gate = unit(y), unit(dh), unit(gate)
    B, N, D = y.shape
    chunks = triton.cdiv(N, CHUNK)
    dy = y.new_empty(B, N, D)
    partial = y.new_empty(B, chunks, 1, D, dtype=torch.float32)
    with torch.cuda.device_of(y):
        _backward_kernel[(B * chunks, triton.cdiv(D, WIDTH))](
            dy, partial, dh, y, gate,
            N, D, dh.stride(0), dh.stride(1), y.stride(0), y.stride(1), gate.stride(0),
            WIDTH=WIDTH, CHUNK=CHUNK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        (dgate,) = sum_chunks(partial, y.dtype)
    return dy, dgate


# ------------------------------------------------------------------------------ public function


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * y`, the gate being a sample's own.

    Runs the Triton kernel on CUDA tensors and the PyTorch reference elsewhere. Differentiable once
    in `x`, `y` and `gate`; `torch.compile` keeps it whole.

    Args:
        x: tokens (B, N, D), float32, bfloat16 or float16, of any strides.
        y: (B, N, D), dtype and device of `x`.
        gate: (B, D), dtype and device of `x`.

    Returns:
        (B, N, D), contiguous, in the dtype of `x`; computed in float32.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: an input is no tensor, its dtype is not one of the three, or the dtypes differ.

    Source: adaLN-Zero of DiT (Peebles & Xie 2023, section 3.2).
    """
    _common.check_tensors(x=x, y=y, gate=gate)
    return _gated_residual(x, y, gate)


def _check(x: Tensor, y: Tensor, gate: Tensor) -> None:
    _common.check_tokens(x)
    _common.check_beside({"y": y}, x, "(B, N, D)", x.shape)
    _common.check_beside({"gate": gate}, x, "(B, D)", (x.shape[0], x.shape[2]))


@torch.library.custom_op("accelkit::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    _check(x, y, gate)
    kernel, reference = _forward_triton, gated_residual_reference
    return run("gated_residual", kernel, reference, x, y, gate).contiguous()


@torch.library.custom_op("accelkit::gated_residual_backward", mutates_args=())
def _gated_residual_backward(dh: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dy, dgate = run("gated_residual", _backward_triton, _backward_reference, y, dh, gate)
    return dy.contiguous(), dgate


@_gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    _check(x, y, gate)
    return x.new_empty(x.shape)


@_gated_residual_backward.register_fake
def _(dh: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, y, gate = inputs
    ctx.save_for_backward(y, gate)


def _backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, gate = ctx.saved_tensors
    return dh, *_gated_residual_backward(dh, y, gate)


_gated_residual.register_autograd(_backward, setup_context=_setup_context)
