"""Adaptive layer norm: LayerNorm without affine, then the modulation that conditions a DiT block.

For a token x of sample b, over its D features:

    n = (x - mean(x)) / sqrt(var(x) + eps)        Ba, Kiros & Hinton 2016, eq. 3 (biased variance)
    y = n * (1 + scale[b]) + shift[b]             Peebles & Xie 2023, adaLN and adaLN-Zero

and backwards, with dy the gradient of y and g = dy * (1 + scale[b]):

    dx        = (g - mean(g) - n * mean(g * n)) / sqrt(var(x) + eps)
    dshift[b] = sum of dy over the tokens
    dscale[b] = sum of dy * n over the tokens

The statistics are float32 and are recomputed backwards: x has to be read there anyway, so saving
them would only add memory traffic.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import CHUNK, HAS_TRITON, run, sum_chunks, tile, unit

__all__ = ["layernorm_modulate", "layernorm_modulate_reference"]

# ---------------------------------------------------------------------------- PyTorch reference


def layernorm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> Tensor:
    """What `layernorm_modulate` computes, in plain PyTorch; float64 is taken too, and kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)  # (B, N, D)
    return (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(x.dtype)


def _backward_reference(
    x: Tensor, dy: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dy_wide = dy.to(wide)
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()  # (B, N, 1)
    n = centred * rstd
    g = dy_wide * (1 + scale.to(wide)[:, None])
    dx = (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) * rstd
    dshift, dscale = dy_wide.sum(1), (dy_wide * n).sum(1)
    return dx.to(x.dtype), dshift.to(x.dtype), dscale.to(x.dtype)


# ------------------------------------------------------------------------------- Triton kernels

# A token's features stay in registers, so D has a largest value: the widest power of two at which
# the backward kernel, compiled for sm_80 to sm_100, does not spill. Wider inputs run the reference.
MAX_WIDTH = 8192

if HAS_TRITON:
    import triton
    import triton.language as tl

    from accelkit_kernels._common import normalise

    @triton.jit
    def _forward_kernel(
        y_ptr, x_ptr, shift_ptr, scale_ptr,
        N, D, eps, x_b, x_n, shift_b, scale_b,
        WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    ):  # fmt: skip
        """One program per tile of TOKENS tokens of one sample."""
        tiles = tl.cdiv(N, TOKENS)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)[:, None].to(tl.int64)
        col = tl.arange(0, WIDTH)
        kept = col < D
        mask = (token < N) & kept[None, :]

        x = tl.load(x_ptr + b * x_b + token * x_n + col[None, :], mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + b * shift_b + col, kept, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + b * scale_b + col, kept, other=0.0).to(tl.float32)
        n, _ = normalise(x, mask, D, eps)
        y = n * (1.0 + scale)[None, :] + shift[None, :]
        tl.store(y_ptr + (b * N + token) * D + col[None, :], y.to(y_ptr.dtype.element_ty), mask)

    @triton.jit
    def _backward_kernel(
        dx_ptr, partial_ptr, dy_ptr, x_ptr, scale_ptr,
        N, D, eps, dy_b, dy_n, x_b, x_n, scale_b,
        WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """One program per CHUNK tokens of one sample: their dx, and their part of both sums."""
        chunks = tl.cdiv(N, CHUNK)
        b = (tl.program_id(0) // chunks).to(tl.int64)
        chunk = tl.program_id(0) % chunks
        col = tl.arange(0, WIDTH)
        kept = col < D

        gain = 1.0 + tl.load(scale_ptr + b * scale_b + col, kept, other=0.0).to(tl.float32)
        dshift = tl.zeros([WIDTH], tl.float32)
        dscale = tl.zeros([WIDTH], tl.float32)
        for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, N), TOKENS):
            token = first + tl.arange(0, TOKENS)[:, None].to(tl.int64)
            mask = (token < N) & kept[None, :]
            x_at = x_ptr + b * x_b + token * x_n + col[None, :]
            dy_at = dy_ptr + b * dy_b + token * dy_n + col[None, :]
            x = tl.load(x_at, mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_at, mask, other=0.0).to(tl.float32)
            n, rstd = normalise(x, mask, D, eps)
            g = dy * gain[None, :]
            mean_g = (tl.sum(g, axis=1) / D)[:, None]
            mean_gn = (tl.sum(g * n, axis=1) / D)[:, None]
            dx = (g - mean_g - n * mean_gn) * rstd
            dx_at = dx_ptr + (b * N + token) * D + col[None, :]
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask)
            # Summed here, not after the loop: tiles kept until then spill on sm_86 and sm_100.
            dshift += tl.sum(dy, axis=0)
            dscale += tl.sum(dy * n, axis=0)

        out = partial_ptr + (b * chunks + chunk) * 2 * D + col  # partial: (B, chunks, 2, D)
        tl.store(out, dshift, kept)
        tl.store(out + D, dscale, kept)


def _forward_triton(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    x, shift, scale = unit(x), unit(shift), unit(scale)
    B, N, D = x.shape
    width, tokens, warps = tile(D)
    y = x.new_empty(B, N, D)
    with torch.cuda.device_of(x):
        _forward_kernel[(B * triton.cdiv(N, tokens),)](
            y, x, shift, scale,
            N, D, eps, x.stride(0), x.stride(1), shift.stride(0), scale.stride(0),
            WIDTH=width, TOKENS=tokens, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _backward_triton(
    x: Tensor, dy: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy, scale = unit(x), unit(dy), unit(scale)
    B, N, D = x.shape
    width, tokens, warps = tile(D)
    chunks = triton.cdiv(N, CHUNK)
    dx = x.new_empty(B, N, D)
    partial = x.new_empty(B, chunks, 2, D, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[(B * chunks,)](
            dx, partial, dy, x, scale,
            N, D, eps, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), scale.stride(0),
            WIDTH=width, TOKENS=tokens, CHUNK=CHUNK, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        dshift, dscale = sum_chunks(partial, x.dtype)
    return dx, dshift, dscale


# ------------------------------------------------------------------------------ public function


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension without affine, times `1 + scale`, plus `shift`.

    Runs the Triton kernel on CUDA tensors and the PyTorch reference elsewhere. Differentiable once
    in `x`, `shift` and `scale`; `torch.compile` keeps it whole.

    Args:
        x: tokens (B, N, D), float32, bfloat16 or float16, of any strides.
        shift: (B, D), dtype and device of `x`.
        scale: (B, D), dtype and device of `x`.
        eps: added to the variance; DiT uses 1e-6.

    Returns:
        (B, N, D), contiguous, in the dtype of `x`; computed in float32.

    Raises:
        ValueError: a shape or device does not fit, or `eps` is not positive.
        TypeError: an input is no tensor, its dtype is not one of the three, or the dtypes differ.

    Source: adaLN of DiT (Peebles & Xie 2023, section 3.2) on the layer norm of Ba et al. 2016.
    """
    _common.check_tensors(x=x, shift=shift, scale=scale)
    return _layernorm_modulate(x, shift, scale, eps)


def _check(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    _common.check_tokens(x, eps)
    expected = (x.shape[0], x.shape[2])
    _common.check_beside({"shift": shift, "scale": scale}, x, "(B, D)", expected)


@torch.library.custom_op("accelkit::layernorm_modulate", mutates_args=())
def _layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    _check(x, shift, scale, eps)
    return run(
        "layernorm_modulate", _forward_triton, layernorm_modulate_reference,
        x, shift, scale, eps, max_width=MAX_WIDTH,
    ).contiguous()  # fmt: skip


@torch.library.custom_op("accelkit::layernorm_modulate_backward", mutates_args=())
def _layernorm_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dshift, dscale = run(
        "layernorm_modulate", _backward_triton, _backward_reference,
        x, dy, scale, eps, max_width=MAX_WIDTH,
    )  # fmt: skip
    return dx.contiguous(), dshift, dscale


@_layernorm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    _check(x, shift, scale, eps)
    return x.new_empty(x.shape)


@_layernorm_modulate_backward.register_fake
def _(dy: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(scale.shape), x.new_empty(scale.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    x, _, scale, eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.eps = eps


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, scale = ctx.saved_tensors
    dx, dshift, dscale = _layernorm_modulate_backward(dy, x, scale, ctx.eps)
    return dx, dshift, dscale, None


_layernorm_modulate.register_autograd(_backward, setup_context=_setup_context)
