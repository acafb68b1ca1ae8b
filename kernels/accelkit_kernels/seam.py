"""The seam between two branches of a DiT block: the gated residual of one, the norm of the next.

For a token x of sample b and the branch's output y for it, over its D features:

    h = x + gate[b] * y                           Peebles & Xie 2023, adaLN-Zero's alpha
    n = (h - mean(h)) / sqrt(var(h) + eps)        Ba, Kiros & Hinton 2016, eq. 3 (biased variance)
    m = n * (1 + scale[b]) + shift[b]             Peebles & Xie 2023, adaLN's gamma and beta

and backwards, with dh and dm the gradients of the two results and g = dm * (1 + scale[b]):

    dx        = dh + (g - mean(g) - n * mean(g * n)) / sqrt(var(h) + eps)
    dy        = gate[b] * dx
    dgate[b]  = sum of dx * y over the tokens
    dshift[b] = sum of dm over the tokens
    dscale[b] = sum of dm * n over the tokens

The norm reads h as it is stored, rounded to its dtype, so that forwards and backwards normalise the
same numbers and the two results are those of `gated_residual` and `layernorm_modulate` in turn.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from typing import Any

import torch
from torch import Tensor

from accelkit_kernels import _common, adaln, gated
from accelkit_kernels._common import CHUNK, HAS_TRITON, run, sum_chunks, tile, unit

__all__ = ["gated_residual_layernorm_modulate", "gated_residual_layernorm_modulate_reference"]

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# ---------------------------------------------------------------------------- PyTorch reference


def gated_residual_layernorm_modulate_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """What `gated_residual_layernorm_modulate` computes, in plain PyTorch; float64 too, kept."""
    h = gated.gated_residual_reference(x, y, gate)
    return h, adaln.layernorm_modulate_reference(h, shift, scale, eps)


def _backward_reference(
    h: Tensor, dh: Tensor, dm: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> Grads:
    wide = torch.promote_types(h.dtype, torch.float32)
    through, dshift, dscale = adaln._backward_reference(h.to(wide), dm.to(wide), scale, eps)
    dx = dh.to(wide) + through  # (B, N, D)
    dy, dgate = gated._backward_reference(y.to(wide), dx, gate)
    vectors = dgate.to(h.dtype), dshift.to(h.dtype), dscale.to(h.dtype)
    return dx.to(h.dtype), dy.to(h.dtype), *vectors


# ------------------------------------------------------------------------------- Triton kernels

# As in adaln.py: the widest power of two at which the backward kernel does not spill, compiled for
# sm_80 to sm_100; at 8192 it does on each of them. Wider inputs run the reference.
MAX_WIDTH = 4096

if HAS_TRITON:
    import triton
    import triton.language as tl

    from accelkit_kernels._common import normalise

    @triton.jit
    def _forward_kernel(
        h_ptr, m_ptr, x_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr,
        N, D, eps, x_b, x_n, y_b, y_n, gate_b, shift_b, scale_b,
        WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    ):  # fmt: skip
        """One program per tile of TOKENS tokens of one sample."""
        tiles = tl.cdiv(N, TOKENS)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)[:, None].to(tl.int64)
        col = tl.arange(0, WIDTH)
        kept = col < D
        mask = (token < N) & kept[None, :]
        to = (b * N + token) * D + col[None, :]

        x = tl.load(x_ptr + b * x_b + token * x_n + col[None, :], mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * y_b + token * y_n + col[None, :], mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + b * gate_b + col, kept, other=0.0).to(tl.float32)
        h = (x + gate[None, :] * y).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + to, h, mask)
        shift = tl.load(shift_ptr + b * shift_b + col, kept, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + b * scale_b + col, kept, other=0.0).to(tl.float32)
        n, _ = normalise(h.to(tl.float32), mask, D, eps)
        m = n * (1.0 + scale)[None, :] + shift[None, :]
        tl.store(m_ptr + to, m.to(m_ptr.dtype.element_ty), mask)

    @triton.jit
    def _backward_kernel(
        dx_ptr, dy_ptr, partial_ptr, dh_ptr, dm_ptr, h_ptr, y_ptr, gate_ptr, scale_ptr,
        N, D, eps, dh_b, dh_n, dm_b, dm_n, y_b, y_n, gate_b, scale_b,
        WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """One program per CHUNK tokens of one sample: dx and dy, and their part of three sums."""
        chunks = tl.cdiv(N, CHUNK)
        b = (tl.program_id(0) // chunks).to(tl.int64)
        chunk = tl.program_id(0) % chunks
        col = tl.arange(0, WIDTH)
        kept = col < D

        gate = tl.load(gate_ptr + b * gate_b + col, kept, other=0.0).to(tl.float32)
        gain = 1.0 + tl.load(scale_ptr + b * scale_b + col, kept, other=0.0).to(tl.float32)
        dgate = tl.zeros([WIDTH], tl.float32)
        dshift = tl.zeros([WIDTH], tl.float32)
        dscale = tl.zeros([WIDTH], tl.float32)
        for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, N), TOKENS):
            token = first + tl.arange(0, TOKENS)[:, None].to(tl.int64)
            mask = (token < N) & kept[None, :]
            at = (b * N + token) * D + col[None, :]  # of h, which is contiguous, and of dx and dy
            dm_at = dm_ptr + b * dm_b + token * dm_n + col[None, :]
            dh_at = dh_ptr + b * dh_b + token * dh_n + col[None, :]
            y_at = y_ptr + b * y_b + token * y_n + col[None, :]
            h = tl.load(h_ptr + at, mask, other=0.0).to(tl.float32)
            dm = tl.load(dm_at, mask, other=0.0).to(tl.float32)
            n, rstd = normalise(h, mask, D, eps)
            dshift += tl.sum(dm, axis=0)
            dscale += tl.sum(dm * n, axis=0)
            g = dm * gain[None, :]
            mean_g = (tl.sum(g, axis=1) / D)[:, None]
            mean_gn = (tl.sum(g * n, axis=1) / D)[:, None]
            # Loaded here, not at the top: two tiles less to hold across the reductions.
            dh = tl.load(dh_at, mask, other=0.0).to(tl.float32)
            dx = dh + (g - mean_g - n * mean_gn) * rstd
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
            dy = dx * gate[None, :]
            tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask)
            y = tl.load(y_at, mask, other=0.0).to(tl.float32)
            # Masked features have y = 0, so that -mean_g in their dx adds nothing.
            dgate += tl.sum(dx * y, axis=0)

        out = partial_ptr + (b * chunks + chunk) * 3 * D + col  # partial: (B, chunks, 3, D)
        tl.store(out, dgate, kept)
        tl.store(out + D, dshift, kept)
        tl.store(out + 2 * D, dscale, kept)


def _forward_triton(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, y, gate, shift, scale = unit(x), unit(y), unit(gate), unit(shift), unit(scale)
    B, N, D = x.shape
    width, tokens, warps = tile(D)
    h, m = x.new_empty(B, N, D), x.new_empty(B, N, D)
    with torch.cuda.device_of(x):
        _forward_kernel[(B * triton.cdiv(N, tokens),)](
            h, m, x, y, gate, shift, scale,
            N, D, eps, x.stride(0), x.stride(1), y.stride(0), y.stride(1),
            gate.stride(0), shift.stride(0), scale.stride(0),
            WIDTH=width, TOKENS=tokens, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return h, m


def _backward_triton(
    h: Tensor, dh: Tensor, dm: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> Grads:
    dh, dm, y, gate, scale = unit(dh), unit(dm), unit(y), unit(gate), unit(scale)
    h = h.contiguous()
    B, N, D = h.shape
    width, tokens, warps = tile(D)
    chunks = triton.cdiv(N, CHUNK)
    dx, dy = h.new_empty(B, N, D), h.new_empty(B, N, D)
    partial = h.new_empty(B, chunks, 3, D, dtype=torch.float32)
    with torch.cuda.device_of(h):
        _backward_kernel[(B * chunks,)](
            dx, dy, partial, dh, dm, h, y, gate, scale,
            N, D, eps, dh.stride(0), dh.stride(1), dm.stride(0), dm.stride(1),
            y.stride(0), y.stride(1), gate.stride(0), scale.stride(0),
            WIDTH=width, TOKENS=tokens, CHUNK=CHUNK, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        dgate, dshift, dscale = sum_chunks(partial, h.dtype)
    return dx, dy, dgate, dshift, dscale


# ------------------------------------------------------------------------------ public function


def gated_residual_layernorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`gated_residual(x, y, gate)`, and `layernorm_modulate` of it, in one pass.

    Runs the Triton kernel on CUDA tensors and the PyTorch reference elsewhere. Differentiable once
    in all five tensors; `torch.compile` keeps it whole.

    Args:
        x: tokens (B, N, D), float32, bfloat16 or float16, of any strides.
        y: the branch's output (B, N, D), dtype and device of `x`.
        gate: (B, D), dtype and device of `x`.
        shift: (B, D), dtype and device of `x`.
        scale: (B, D), dtype and device of `x`.
        eps: added to the variance; DiT uses 1e-6.

    Returns:
        x + gate * y and its modulated norm, both (B, N, D), contiguous, in the dtype of `x`;
        computed in float32.

    Raises:
        ValueError: a shape or device does not fit, or `eps` is not positive.
        TypeError: an input is no tensor, its dtype is not one of the three, or the dtypes differ.

    Source: adaLN-Zero of DiT (Peebles & Xie 2023, section 3.2), layer norm of Ba et al. 2016.
    """
    _common.check_tensors(x=x, y=y, gate=gate, shift=shift, scale=scale)
    return _seam(x, y, gate, shift, scale, eps)


def _check(x: Tensor, y: Tensor, eps: float, **vectors: Tensor) -> None:
    _common.check_tokens(x, eps)
    _common.check_beside({"y": y}, x, "(B, N, D)", x.shape)
    _common.check_beside(vectors, x, "(B, D)", (x.shape[0], x.shape[2]))


@torch.library.custom_op("accelkit::gated_residual_layernorm_modulate", mutates_args=())
def _seam(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check(x, y, eps, gate=gate, shift=shift, scale=scale)
    h, m = run(
        "gated_residual_layernorm_modulate",
        _forward_triton, gated_residual_layernorm_modulate_reference,
        x, y, gate, shift, scale, eps, max_width=MAX_WIDTH,
    )  # fmt: skip
    return h.contiguous(), m.contiguous()


@torch.library.custom_op("accelkit::gated_residual_layernorm_modulate_backward", mutates_args=())
def _seam_backward(
    dh: Tensor, dm: Tensor, h: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dy, *vectors = run(
        "gated_residual_layernorm_modulate",
        _backward_triton, _backward_reference,
        h, dh, dm, y, gate, scale, eps, max_width=MAX_WIDTH,
    )  # fmt: skip
    dgate, dshift, dscale = vectors
    return dx.contiguous(), dy.contiguous(), dgate, dshift, dscale


@_seam.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check(x, y, eps, gate=gate, shift=shift, scale=scale)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_seam_backward.register_fake
def _(
    dh: Tensor, dm: Tensor, h: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dgate, dshift, dscale = (gate.new_empty(gate.shape) for _ in range(3))
    return h.new_empty(h.shape), h.new_empty(h.shape), dgate, dshift, dscale


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, _, scale, eps = inputs
    ctx.save_for_backward(output[0], y, gate, scale)
    ctx.eps = eps


def _backward(ctx: Any, dh: Tensor, dm: Tensor) -> tuple[Any, ...]:
    return *_seam_backward(dh, dm, *ctx.saved_tensors, ctx.eps), None


_seam.register_autograd(_backward, setup_context=_setup_context)
