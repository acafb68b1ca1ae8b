"""Bias, activation and gate between the two matrix products of an MLP.

With z = x + bias, over rows of F features:

    bias_gelu_tanh   out = gelu_tanh(z)                        MLP of DiT, PixArt
    bias_geglu       out = gelu(z) * (value + value_bias)      Shazeer 2020, section 2: GEGLU
    bias_swiglu      out = silu(z) * (value + value_bias)      Shazeer 2020, section 2: SwiGLU

where Phi and phi are the normal distribution function and its density:

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

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accelkit_kernels import _activation_kernels, _common
from accelkit_kernels._activation_kernels import Grads, Maybe, present
from accelkit_kernels._common import run

__all__ = [
    "bias_geglu",
    "bias_geglu_reference",
    "bias_gelu_tanh",
    "bias_gelu_tanh_reference",
    "bias_swiglu",
    "bias_swiglu_reference",
]

GELUS = {"tanh": "gelu_tanh", "none": "gelu"}  # keyed by torch.nn.functional.gelu's names

# ---------------------------------------------------------------------------- PyTorch reference


def _widened(act: str, x: Tensor, *rest: Maybe) -> tuple[Tensor, Maybe]:
    """Return act(x + bias) and value + value_bias in float32, or in float64 if given."""
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
    if act == "silu":  # autograd does not record here, so the backward operators are called
        dx = torch.ops.aten.silu_backward(dact, z)
    else:
        approximate = "tanh" if act == "gelu_tanh" else "none"
        dx = torch.ops.aten.gelu_backward(dact, z, approximate=approximate)
    rows = dx.flatten(0, -2).sum(0), dvalue.flatten(0, -2).sum(0)
    return present(x.dtype, dx, rows[0], dvalue, rows[1], bias, value, value_bias)


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
        ValueError: a shape or device does not match.
        TypeError: an input is not a tensor, or its dtype is not supported or not that of `x`.

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

    The halves are separate arguments because models differ in which half of a projection is the
    gate: the second in diffusers, the first in the released DiMR. `projection.chunk(2, -1)` copies
    nothing.

    Args:
        gate: input of the activation (..., F), float32, bfloat16 or float16, of any strides.
        value: multiplied by the activation; shape, dtype and device of `gate`.
        gate_bias: (F,), dtype and device of `gate`, or None.
        value_bias: (F,), dtype and device of `gate`, or None.
        approximate: "tanh", or "none" for the exact form with erf (diffusers' GEGLU, DiMR).

    Returns:
        (..., F), contiguous, in the dtype of `gate`; computed in float32. Differentiable once.

    Raises:
        ValueError: a shape or device does not match, or `approximate` is not one of the two.
        TypeError: an input is not a tensor, or its dtype is not supported or not that of `gate`.

    Source: Shazeer 2020, "GLU variants improve transformer".
    """
    if approximate not in GELUS:
        raise ValueError(f'approximate is {approximate!r}, expected "tanh" or "none"')
    return _glu(gate, value, gate_bias, value_bias, GELUS[approximate])


def bias_swiglu(
    gate: Tensor, value: Tensor, gate_bias: Tensor | None = None, value_bias: Tensor | None = None
) -> Tensor:
    """`silu(gate + gate_bias) * (value + value_bias)`.

    Arguments, result and errors are those of `bias_geglu`.

    Source: Shazeer 2020, section 2; the MLP of FiT (Lu et al. 2024).
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
    _common.check_like(x, {"value": value}, "(..., F)", x.shape, name)
    biases = {of_bias: bias, "value_bias": value_bias}
    _common.check_like(x, biases, "(F,)", (x.shape[-1],), name)


@torch.library.custom_op("accelkit::bias_act", mutates_args=())
def _bias_act(x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str) -> Tensor:
    _check(x, bias, value, value_bias, act)
    inputs = x, bias, value, value_bias, act
    return run(f"bias_act[{act}]", _activation_kernels.forward, _reference, *inputs).contiguous()


@torch.library.custom_op("accelkit::bias_act_backward", mutates_args=())
def _bias_act_backward(
    dout: Tensor, x: Tensor, bias: Maybe, value: Maybe, value_bias: Maybe, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = x, dout, bias, value, value_bias, act
    dx, dbias, dvalue, dvalue_bias = run(
        f"bias_act[{act}]", _activation_kernels.backward, _backward_reference, *inputs
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
