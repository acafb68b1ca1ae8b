"""Time-dependent norm, whose affine moves from one vector to another with the noise level.

For a token x of sample b at noise level t[b], over its D features. Each of scale and shift is given
by four vectors, which are two values, a slope and an offset:

    s[b]     = sigmoid(slope * t[b] + offset)           per feature
    gamma[b] = s[b] * high + (1 - s[b]) * low           Liu et al. 2024 (DiMR), section 3.3: TD-LN
    y        = n * gamma[b] + beta[b]

    n = (x - mean(x)) / sqrt(var(x) + eps)              LayerNorm: Ba, Kiros & Hinton 2016, eq. 3
    n = x / (rms + eps),  rms = sqrt(mean(x^2))         RMS: Zhang & Sennrich 2019, eq. 4; no beta

with eps outside the root in the RMS form, as in the code released with DiMR. Backwards, with dy the
gradient of y and g = dy * gamma[b]:

    dx = (g - mean(g) - n * mean(g * n)) / sqrt(var(x) + eps)                    LayerNorm
    dx = (g - n * mean(g * n) * (rms + eps) / rms) / (rms + eps)                 RMS, g / eps at 0
    dbeta[b]  = sum of dy over the tokens,  dgamma[b] = sum of dy * n over the tokens
    dhigh     = sum of dgamma[b] * s[b] over the samples,  dlow likewise with 1 - s[b]
    dz[b]     = dgamma[b] * (high - low) * s[b] * (1 - s[b])
    dslope    = sum of dz[b] * t[b],  doffset = sum of dz[b]
    dt[b]     = sum of dz[b] * slope over the features
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from typing import Any

import torch
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import CHUNK, HAS_TRITON, run, sum_chunks, tile, unit
from accelkit_kernels._time_vectors import vector_grads, vectors_at, vectors_at_triton

__all__ = ["td_norm", "td_norm_reference"]

Grads = tuple[Tensor, Tensor, Tensor, Tensor]

# ---------------------------------------------------------------------------- PyTorch reference


def _normalised(x: Tensor, rms: bool, eps: float) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return n, the factor that x was normalised by, and the factor of mean(g * n) in dx."""
    if rms:
        root = x.square().mean(-1, keepdim=True).sqrt()  # (B, N, 1)
        inverse = 1 / (root + eps)
        return x * inverse, inverse, torch.where(root > 0, (root + eps) / root, 0)
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * inverse, inverse, 1.0


def td_norm_reference(
    x: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """What `td_norm` computes, in plain PyTorch; float64 is taken too, and kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    eps = (1e-8 if shift is None else 1e-5) if eps is None else eps
    n, _, _ = _normalised(x.to(wide), shift is None, eps)
    y = n * vectors_at(level.to(wide), scale.to(wide))[:, None]
    if shift is not None:
        y = y + vectors_at(level.to(wide), shift.to(wide))[:, None]
    return y.to(x.dtype)


def _backward_reference(
    x: Tensor, dy: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> Grads:
    wide = torch.promote_types(x.dtype, torch.float32)
    n, inverse, factor = _normalised(x.to(wide), shift is None, eps)
    g = dy.to(wide) * vectors_at(level.to(wide), scale.to(wide))[:, None]
    dx = g - n * (g * n).mean(-1, keepdim=True) * factor
    if shift is not None:
        dx = dx - g.mean(-1, keepdim=True)
    sums = [(dy.to(wide) * n).sum(1), dy.to(wide).sum(1)]
    return (dx * inverse).to(x.dtype), *vector_grads(sums, level, scale, shift)


# ------------------------------------------------------------------------------- Triton kernels

# A token's features stay in registers. This is the widest power of two at which the backward kernel
# does not spill, compiled for sm_80 to sm_100. Wider inputs run the reference.
MAX_WIDTH = 8192

if HAS_TRITON:
    import triton
    import triton.language as tl

    from accelkit_kernels._common import normalise

    @triton.jit
    def _normalise(x, mask, D, eps, RMS: tl.constexpr):
        """Return n, its inverse deviation, and the factor of mean(g * n) in dx."""
        if RMS:
            root = tl.sqrt(tl.sum(x * x, axis=1) / D)[:, None]
            inverse = 1.0 / (root + eps)
            n = x * inverse
            factor = tl.where(root > 0, (root + eps) / root, 0.0)
        else:
            n, inverse = normalise(x, mask, D, eps)
            factor = 1.0
        return n, inverse, factor

    @triton.jit
    def _forward_kernel(
        y_ptr, x_ptr, gamma_ptr, beta_ptr, N, D, eps, x_b, x_n,
        RMS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    ):  # fmt: skip
        """One program per tile of TOKENS tokens of one sample."""
        tiles = tl.cdiv(N, TOKENS)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)[:, None].to(tl.int64)
        col = tl.arange(0, WIDTH)
        kept = col < D
        mask = (token < N) & kept[None, :]

        x = tl.load(x_ptr + b * x_b + token * x_n + col[None, :], mask, other=0.0).to(tl.float32)
        n, _, _ = _normalise(x, mask, D, eps, RMS)
        y = n * tl.load(gamma_ptr + b * D + col, kept, other=0.0)[None, :]
        if not RMS:
            y += tl.load(beta_ptr + b * D + col, kept, other=0.0)[None, :]
        tl.store(y_ptr + (b * N + token) * D + col[None, :], y.to(y_ptr.dtype.element_ty), mask)

    @triton.jit
    def _backward_kernel(
        dx_ptr, partial_ptr, dy_ptr, x_ptr, gamma_ptr, N, D, eps, dy_b, dy_n, x_b, x_n,
        RMS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """One program per CHUNK tokens of one sample: their dx, and their part of the sums."""
        chunks = tl.cdiv(N, CHUNK)
        b = (tl.program_id(0) // chunks).to(tl.int64)
        chunk = tl.program_id(0) % chunks
        col = tl.arange(0, WIDTH)
        kept = col < D

        gamma = tl.load(gamma_ptr + b * D + col, kept, other=0.0)
        dgamma = tl.zeros([WIDTH], tl.float32)
        dbeta = tl.zeros([WIDTH], tl.float32)
        for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, N), TOKENS):
            token = first + tl.arange(0, TOKENS)[:, None].to(tl.int64)
            mask = (token < N) & kept[None, :]
            x_at = x_ptr + b * x_b + token * x_n + col[None, :]
            dy_at = dy_ptr + b * dy_b + token * dy_n + col[None, :]
            x = tl.load(x_at, mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_at, mask, other=0.0).to(tl.float32)
            n, inverse, factor = _normalise(x, mask, D, eps, RMS)
            g = dy * gamma[None, :]
            dx = g - n * ((tl.sum(g * n, axis=1) / D)[:, None] * factor)
            if not RMS:
                dx -= (tl.sum(g, axis=1) / D)[:, None]
                dbeta += tl.sum(dy, axis=0)
            dgamma += tl.sum(dy * n, axis=0)
            dx_at = dx_ptr + (b * N + token) * D + col[None, :]
            tl.store(dx_at, (dx * inverse).to(dx_ptr.dtype.element_ty), mask)

        count: tl.constexpr = 1 if RMS else 2
        out = partial_ptr + (b * chunks + chunk) * count * D + col  # partial: (B, chunks, count, D)
        tl.store(out, dgamma, kept)
        if not RMS:
            tl.store(out + D, dbeta, kept)


def _forward_triton(
    x: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> Tensor:
    x = unit(x)
    B, N, D = x.shape
    width, tokens, warps = tile(D)
    y = x.new_empty(B, N, D)
    with torch.cuda.device_of(x):
        gamma = vectors_at_triton(level, scale)
        beta = gamma if shift is None else vectors_at_triton(level, shift)
        _forward_kernel[(B * triton.cdiv(N, tokens),)](
            y, x, gamma, beta, N, D, eps, x.stride(0), x.stride(1), RMS=shift is None,
            WIDTH=width, TOKENS=tokens, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _backward_triton(
    x: Tensor, dy: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> Grads:
    x, dy = unit(x), unit(dy)
    B, N, D = x.shape
    width, tokens, warps = tile(D)
    chunks = triton.cdiv(N, CHUNK)
    dx = x.new_empty(B, N, D)
    partial = x.new_empty(B, chunks, 1 if shift is None else 2, D, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[(B * chunks,)](
            dx, partial, dy, x, vectors_at_triton(level, scale),
            N, D, eps, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), RMS=shift is None,
            WIDTH=width, TOKENS=tokens, CHUNK=CHUNK, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        sums = sum_chunks(partial, torch.float32)
    return dx, *vector_grads(sums, level, scale, shift)


# ------------------------------------------------------------------------------ public function


def td_norm(
    x: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """LayerNorm, or without `shift` RMS norm, whose affine depends on the noise level.

    Runs the Triton kernels on CUDA tensors and the PyTorch reference elsewhere. Differentiable once
    in all tensors; `torch.compile` keeps it whole.

    Args:
        x: tokens (B, N, D), float32, bfloat16 or float16, of any strides.
        level: each sample's noise level (B,), float32, in the unit the model was trained with. The
            released DiMR uses 2 * n / 1000 - 1 for its step n.
        scale: (4, D) on the device of `x`, in its dtype or float32: the values where the sigmoid is
            1 and where it is 0, then slope and offset of its argument. DiMR stores the slope
            minus 1.
        shift: the same for the summand, in the dtype of `scale`; None for the RMS form.
        eps: 1e-5 by default, added to the variance; in the RMS form 1e-8, added to the root.

    Returns:
        (B, N, D), contiguous, in the dtype of `x`; computed in float32.

    Raises:
        ValueError: a shape or device does not match, or `eps` is not positive.
        TypeError: an input is not a tensor, or its dtype is not the expected one.

    Source: TD-LN of DiMR (Liu et al. 2024, section 3.3).
    """
    given = {"x": x, "level": level, "scale": scale}
    _common.check_tensors(**given if shift is None else given | {"shift": shift})
    if eps is None:
        eps = 1e-8 if shift is None else 1e-5
    return _td_norm(x, level, scale, shift, eps)


def _check(x: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> None:
    _common.check_tokens(x, eps)
    # Half precision would round a noise level to a different one.
    _common.check_like(x, {"level": level}, "(B,)", (x.shape[0],), dtype=torch.float32)
    if scale.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"scale is {scale.dtype}, expected {x.dtype} like x, or float32")
    vectors = {"scale": scale, "shift": shift}
    _common.check_like(x, vectors, "(4, D)", (4, x.shape[2]), dtype=scale.dtype)


@torch.library.custom_op("accelkit::td_norm", mutates_args=())
def _td_norm(x: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    _check(x, level, scale, shift, eps)
    return run(
        "td_norm", _forward_triton, td_norm_reference,
        x, level, scale, shift, eps, max_width=MAX_WIDTH,
    ).contiguous()  # fmt: skip


@torch.library.custom_op("accelkit::td_norm_backward", mutates_args=())
def _td_norm_backward(
    dy: Tensor, x: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, *grads = run(
        "td_norm", _backward_triton, _backward_reference,
        x, dy, level, scale, shift, eps, max_width=MAX_WIDTH,
    )  # fmt: skip
    dscale, dshift, dlevel = grads
    return dx.contiguous(), dscale, dshift, dlevel


@_td_norm.register_fake
def _(x: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    _check(x, level, scale, shift, eps)
    return x.new_empty(x.shape)


@_td_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, level: Tensor, scale: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dshift = scale.new_empty(0 if shift is None else shift.shape)
    return x.new_empty(x.shape), scale.new_empty(scale.shape), dshift, level.new_empty(level.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    *tensors, shift = ctx.saved_tensors
    dx, dscale, dshift, dlevel = _td_norm_backward(dy, *tensors, shift, ctx.eps)
    return dx, dlevel, dscale, None if shift is None else dshift, None


_td_norm.register_autograd(_backward, setup_context=_setup_context)
