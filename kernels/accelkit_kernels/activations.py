"""What stands between an MLP's two matrix products: the first one's bias, activation, gate.

With z = x + bias, over rows of F features:

    bias_gelu_tanh   out = gelu_tanh(z)                        MLP of DiT, PixArt
    bias_geglu       out = gelu(z) * (value + value_bias)      Shazeer 2020, section 2: GEGLU
    bias_swiglu      out = silu(z) * (value + value_bias)      Shazeer 2020, section 2: SwiGLU

where, Phi and phi being the normal distribution function and its density,

    gelu(z)      = z * Phi(z)                                  Hendrycks & Gimpel 2016, eq. 1
    gelu_tanh(z) = z * sigmoid(2 * u),  u = sqrt(2 / pi) * (z + 0.044715 * z^3)
                 = z / 2 * (1 + tanh(u))                       ibid., section 2
    silu(z)      = z * sigmoid(z)

and backwards, with act' the derivative:

    gelu'      = Phi(z) + z * phi(z)
    gelu_tanh' = s + z * s * (1 - s) * 2 * u',  s = sigmoid(2 * u)
    silu'      = s + z * s * (1 - s),           s = sigmoid(z)
    dx     = dout * (value + value_bias) * act'(z)             dbias       = sum of dx over the rows
    dvalue = dout * act(z)                                     dvalue_bias = sum of dvalue
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import CHUNK, HAS_TRITON, run, unit

__all__ = [
    "bias_geglu",
    "bias_geglu_reference",
    "bias_gelu_tanh",
    "bias_gelu_tanh_reference",
    "bias_swiglu",
    "bias_swiglu_reference",
]

GELUS = {"tanh": "gelu_tanh", "none": "gelu"}  # by the names of torch.nn.functional.gelu
Maybe = Tensor | None
Grads = tuple[Tensor, Tensor, Tensor, Tensor]

# ---------------------------------------------------------------------------- PyTorch reference


def _widened(act: str, x: Tensor, *rest: Maybe) -> tuple[Tensor, Maybe]:
    """act(x + bias) and value + value_bias, in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias, value, value_bias = (None if t is None else t.to(wide) for t in rest)
    z = x.to(wide) if bias is None else x.to(wide) + bias
    if value is not None and value_bias is not None:
        value = value + value_bias
    if act == "silu":
        return F.silu(z), value
    return F.gelu(z, approximate="tanh" if act == "gelu_tanh" else "none"), value


def _reference(x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str) -> Tensor:
    activated, gated = _widened(act, x, bias, value, value_bias)
    return (activated if gated is None else activated * gated).to(x.dtype)


def bias_gelu_tanh_reference(x: Tensor, bias: Tensor) -> Tensor:
    """What `bias_gelu_tanh` computes, in plain PyTorch; float64 is taken too, and kept."""
    return _reference(x, bias, None, None, "gelu_tanh")


def bias_geglu_reference(
    gate: Tensor,
    value: Tensor,
    gate_bias: Maybe = None,
    value_bias: Maybe = None,
    approximate: str = "tanh",
) -> Tensor:
    """What `bias_geglu` computes, in plain PyTorch; float64 is taken too, and kept."""
    return _reference(gate, gate_bias, value, value_bias, GELUS[approximate])


def bias_swiglu_reference(
    gate: Tensor, value: Tensor, gate_bias: Maybe = None, value_bias: Maybe = None
) -> Tensor:
    """What `bias_swiglu` computes, in plain PyTorch; float64 is taken too, and kept."""
    return _reference(gate, gate_bias, value, value_bias, "silu")


def _backward_reference(
    x: Tensor, dout: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str
) -> Grads:
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    activated, gated = _widened(act, z, None, value, value_bias)
    dvalue = dout.to(wide) * activated
    dact = dout.to(wide) if gated is None else dout.to(wide) * gated
    if act == "silu":  # an operator's own backward runs where autograd does not record
        dx = torch.ops.aten.silu_backward(dact, z)
    else:
        approximate = "tanh" if act == "gelu_tanh" else "none"
        dx = torch.ops.aten.gelu_backward(dact, z, approximate=approximate)
    rows = dx.flatten(0, -2).sum(0), dvalue.flatten(0, -2).sum(0)
    return _present(x.dtype, dx, rows[0], dvalue, rows[1], bias, value, value_bias)


def _present(
    dtype: torch.dtype, dx: Tensor, dbias: Tensor, dvalue: Tensor, dvalue_bias: Tensor,
    *inputs: Maybe,
) -> Grads:  # fmt: skip
    """The gradients in `dtype`, empty where there is no such input: an operator returns no None."""
    grads = zip((dbias, dvalue, dvalue_bias), inputs, strict=True)
    rest = (dx.new_empty(0, dtype=dtype) if t is None else g.to(dtype) for g, t in grads)
    return dx.to(dtype), *rest


# ------------------------------------------------------------------------------- Triton kernels

# Rows and features of a program's tile: 32 elements a thread, and whole lines of 256 bytes in
# bfloat16. A program adds up its rows' share of the biases' gradients.
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
        """act(z) and its derivative, which the compiler drops where it is not used."""
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
        """The same tile: its dx and dvalue, and its part of the biases' gradients."""
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
    """(..., F) as (rows, F): of a half of a wider projection still a view."""
    return unit(t.reshape(-1, t.shape[-1]))


def _launch(
    x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str
) -> tuple[tuple[int, int], tuple[Tensor, ...], dict[str, Any]]:
    """The grid, the tensors that both kernels read (x itself where one is missing), constants."""
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


def _forward_triton(x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str) -> Tensor:
    grid, (flat, gate, *biases), constants = _launch(x, bias, value, value_bias, act)
    out = x.new_empty(x.shape)
    sizes = *flat.shape, flat.stride(0), gate.stride(0)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](out, flat, gate, *biases, *sizes, **constants)
    return out


def _backward_triton(
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
        # Over thousands of chunks, which PyTorch's reduction spreads and adds in a fixed order.
        dbias, dvalue_bias = partial[:, 0].sum(0), partial[:, 1].sum(0)
    return _present(x.dtype, dx, dbias, dvalue, dvalue_bias, bias, value, value_bias)


# ----------------------------------------------------------------------------- public functions


def bias_gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x + bias)` in the tanh approximation, as `torch.nn.functional.gelu` defines it.

    Runs the Triton kernel on CUDA tensors and the PyTorch reference elsewhere. Differentiable once
    in both; `torch.compile` keeps it whole.

    Args:
        x: (..., F), float32, bfloat16 or float16, of any strides.
        bias: (F,), dtype and device of `x`.

    Returns:
        (..., F), contiguous, in the dtype of `x`; computed in float32.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: an input is no tensor, its dtype is not one of the three, or the dtypes differ.

    Source: Hendrycks & Gimpel 2016; the MLP of DiT (Peebles & Xie 2023).
    """
    _common.check_tensors(x=x, bias=bias)
    return _bias_act(x, bias, None, None, "gelu_tanh")


def bias_geglu(
    gate: Tensor,
    value: Tensor,
    gate_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    approximate: str = "tanh",
) -> Tensor:
    """`gelu(gate + gate_bias) * (value + value_bias)`.

    Which half of a projection is the gate differs between models (diffusers takes the second, the
    released DiMR the first), so the halves are given apart: `projection.chunk(2, -1)` copies
    nothing.

    Args:
        gate: what is activated (..., F), float32, bfloat16 or float16, of any strides.
        value: what it multiplies, shape, dtype and device of `gate`.
        gate_bias: (F,), dtype and device of `gate`, or None.
        value_bias: (F,), dtype and device of `gate`, or None.
        approximate: "tanh", or "none" for the exact form with erf (diffusers' GEGLU, DiMR).

    Returns:
        (..., F), contiguous, in the dtype of `gate`; computed in float32. Differentiable once.

    Raises:
        ValueError: a shape or device does not fit, or `approximate` is neither of the two.
        TypeError: an input is no tensor, its dtype is not one of the three, or the dtypes differ.

    Source: Shazeer 2020, "GLU variants improve transformer".
    """
    if approximate not in GELUS:
        raise ValueError(f'approximate is {approximate!r}, expected "tanh" or "none"')
    return _glu(gate, value, gate_bias, value_bias, GELUS[approximate])


def bias_swiglu(
    gate: Tensor, value: Tensor, gate_bias: Tensor | None = None, value_bias: Tensor | None = None
) -> Tensor:
    """`silu(gate + gate_bias) * (value + value_bias)`.

    Arguments, result and errors are those of `bias_geglu`. Source: Shazeer 2020, section 2; the MLP
    of FiT (Lu et al. 2024).
    """
    return _glu(gate, value, gate_bias, value_bias, "silu")


def _glu(gate: Tensor, value: Tensor, gate_bias: Maybe, value_bias: Maybe, act: str) -> Tensor:
    given = {"gate_bias": gate_bias, "value_bias": value_bias}
    given = {name: t for name, t in given.items() if t is not None}
    _common.check_tensors(gate=gate, value=value, **given)
    return _bias_act(gate, gate_bias, value, value_bias, act)


def _check(x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str) -> None:
    name, of_bias = ("x", "bias") if value is None else ("gate", "gate_bias")
    if x.ndim < 2 or x.shape[-1] == 0:
        expected = "expected (..., F) of 2 dimensions or more, with F at least 1"
        raise ValueError(f"{name} has shape {tuple(x.shape)}, {expected}")
    _common.check_dtype(name, x)
    if value is not None:
        _common.check_beside(x, "(..., F)", tuple(x.shape), name, value=value)
    vectors = {of_bias: bias, "value_bias": value_bias}
    vectors_given = {of: t for of, t in vectors.items() if t is not None}
    _common.check_beside(x, "(F,)", (x.shape[-1],), name, **vectors_given)


@torch.library.custom_op("accelkit::bias_act", mutates_args=())
def _bias_act(x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str) -> Tensor:
    _check(x, bias, value, value_bias, act)
    inputs = x, bias, value, value_bias, act
    return run(f"bias_act[{act}]", _forward_triton, _reference, *inputs).contiguous()


@torch.library.custom_op("accelkit::bias_act_backward", mutates_args=())
def _bias_act_backward(
    dout: Tensor, x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = x, dout, bias, value, value_bias, act
    dx, dbias, dvalue, dvalue_bias = run(
        f"bias_act[{act}]", _backward_triton, _backward_reference, *inputs
    )
    return dx.contiguous(), dbias, dvalue.contiguous(), dvalue_bias


@_bias_act.register_fake
def _(x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str) -> Tensor:
    _check(x, bias, value, value_bias, act)
    return x.new_empty(x.shape)


@_bias_act_backward.register_fake
def _(
    dout: Tensor, x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias, dvalue, dvalue_bias = (
        x.new_empty(0 if t is None else t.shape) for t in (bias, value, value_bias)
    )
    return x.new_empty(x.shape), dbias, dvalue, dvalue_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    dx, *grads = _bias_act_backward(dout, x, *rest, ctx.act)
    present = (None if t is None else g for t, g in zip(rest, grads, strict=True))
    return dx, *present, None


_bias_act.register_autograd(_backward, setup_context=_setup_context)
