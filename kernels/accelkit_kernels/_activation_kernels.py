"""Triton kernels for activations.py, which gives the formulas and the references."""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from typing import Any

import torch
from torch import Tensor

from accelkit_kernels._common import CHUNK, HAS_TRITON, unit

Maybe = Tensor | None
Grads = tuple[Tensor, Tensor, Tensor, Tensor]

# A program's tile has CHUNK rows of WIDTH features: 32 elements a thread, and whole lines of 256
# bytes in bfloat16. The program sums the gradients of the biases over its rows.
WIDTH = 128

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _tile_at(rows, D, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)[:, None].to(tl.int64)
        col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        return row, col, (row < rows) & (col < D)[None, :]

    @triton.jit
    def _load_biased(x_ptr, bias_ptr, x_n, row, col, mask, D, BIASED: tl.constexpr):
        z = tl.load(x_ptr + row * x_n + col[None, :], mask, other=0.0).to(tl.float32)
        if BIASED:
            z += tl.load(bias_ptr + col, col < D, other=0.0).to(tl.float32)[None, :]
        return z

    @triton.jit
    def _activate(z, ACT: tl.constexpr):
        """Return act(z) and its derivative, which the compiler drops where it is not used."""
        if ACT == "gelu":
            cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            out = z * cdf
            slope = cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
        elif ACT == "gelu_tanh":
            s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
            out = z * s
            slope = s + out * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        else:
            s = tl.sigmoid(z)
            out = z * s
            slope = s + out * (1.0 - s)
        return out, slope

    @triton.jit
    def _forward_kernel(
        out_ptr, x_ptr, value_ptr, bias_ptr, value_bias_ptr, rows, D, x_n, value_n,
        ACT: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, VALUE_BIASED: tl.constexpr,
        WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """One program per CHUNK rows and WIDTH features."""
        row, col, mask = _tile_at(rows, D, CHUNK, WIDTH)
        z = _load_biased(x_ptr, bias_ptr, x_n, row, col, mask, D, BIASED)
        out, _ = _activate(z, ACT)
        if GATED:
            out *= _load_biased(value_ptr, value_bias_ptr, value_n, row, col, mask, D, VALUE_BIASED)
        tl.store(out_ptr + row * D + col[None, :], out.to(out_ptr.dtype.element_ty), mask)

    @triton.jit
    def _backward_kernel(
        dx_ptr, dvalue_ptr, partial_ptr, dout_ptr, x_ptr, value_ptr, bias_ptr, value_bias_ptr,
        rows, D, dout_n, x_n, value_n,
        ACT: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, VALUE_BIASED: tl.constexpr,
        WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """One program per tile: its dx and dvalue, and its part of the biases' gradients."""
        row, col, mask = _tile_at(rows, D, CHUNK, WIDTH)
        to = row * D + col[None, :]
        out = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * D + col  # partial: (chunks, 2, D)
        dout_at = dout_ptr + row * dout_n + col[None, :]
        dx = tl.load(dout_at, mask, other=0.0).to(tl.float32)
        z = _load_biased(x_ptr, bias_ptr, x_n, row, col, mask, D, BIASED)
        activated, slope = _activate(z, ACT)
        if GATED:
            dvalue = dx * activated
            tl.store(dvalue_ptr + to, dvalue.to(dvalue_ptr.dtype.element_ty), mask)
            if VALUE_BIASED:
                tl.store(out + D, tl.sum(dvalue, axis=0), col < D)
            dx *= _load_biased(value_ptr, value_bias_ptr, value_n, row, col, mask, D, VALUE_BIASED)
        dx *= slope
        tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask)
        if BIASED:
            tl.store(out, tl.sum(dx, axis=0), col < D)


def _rows(t: Tensor) -> Tensor:
    """Return (..., F) as (rows, F), without a copy for half of a wider projection."""
    return unit(t.reshape(-1, t.shape[-1]))


def _launch(
    x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str
) -> tuple[tuple[int, int], tuple[Tensor, ...], dict[str, Any]]:
    """Return the grid, the tensors that both kernels read, and the constants.

    x stands in for a missing tensor.
    """
    flat = _rows(x)
    gate = flat if value is None else _rows(value)
    biases = (flat if t is None else t.contiguous() for t in (bias, value_bias))
    grid = (triton.cdiv(flat.shape[0], CHUNK), triton.cdiv(flat.shape[1], WIDTH))
    constants = {
        "ACT": act, "GATED": value is not None,
        "BIASED": bias is not None, "VALUE_BIASED": value_bias is not None,
        "WIDTH": WIDTH, "CHUNK": CHUNK, "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
    return grid, (flat, gate, *biases), constants


def forward(x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str) -> Tensor:
    grid, (flat, gate, *biases), constants = _launch(x, bias, value, value_bias, act)
    out = x.new_empty(x.shape)
    sizes = *flat.shape, flat.stride(0), gate.stride(0)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](out, flat, gate, *biases, *sizes, **constants)
    return out


def backward(
    x: Tensor, dout: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str
) -> Grads:
    grid, (flat, gate, *biases), constants = _launch(x, bias, value, value_bias, act)
    dflat = _rows(dout)
    dx = x.new_empty(x.shape)
    dvalue = dx if value is None else x.new_empty(x.shape)
    partial = x.new_zeros(grid[0], 2, x.shape[-1], dtype=torch.float32)
    sizes = *flat.shape, dflat.stride(0), flat.stride(0), gate.stride(0)
    with torch.cuda.device_of(x):
        _backward_kernel[grid](dx, dvalue, partial, dflat, flat, gate, *biases, *sizes, **constants)
        # There are thousands of chunks: PyTorch spreads their sum, and adds in a fixed order.
        dbias, dvalue_bias = partial[:, 0].sum(0), partial[:, 1].sum(0)
    return present(x.dtype, dx, dbias, dvalue, dvalue_bias, bias, value, value_bias)


def present(
    dtype: torch.dtype, dx: Tensor, dbias: Tensor, dvalue: Tensor, dvalue_bias: Tensor,
    *inputs: Maybe,
) -> Grads:  # fmt: skip
    """Return the gradients in `dtype`, empty for a missing input: a custom op returns no None."""
    bias, value, value_bias = (
        dx.new_empty(0, dtype=dtype) if t is None else grad.to(dtype)
        for grad, t in zip((dbias, dvalue, dvalue_bias), inputs, strict=True)
    )
    return dx.to(dtype), bias, value, value_bias
