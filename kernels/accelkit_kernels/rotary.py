"""Norm of queries and keys and 2-D rotary embedding, in one pass over both.

For each head of each token, over its d features:

    n = (x - mean(x)) / sqrt(var(x) + eps)                   Ba, Kiros & Hinton 2016, eq. 3
    y[2j]     = n[2j] cos(a_j) - n[2j + 1] sin(a_j)          Su et al. 2021, eq. 34,
    y[2j + 1] = n[2j + 1] cos(a_j) + n[2j] sin(a_j)          on adjacent pairs

with the angles of angles.py; the norm, without affine, is FiTv2's (Wang et al. 2024). Backwards,
with dy the gradient of y, g is dy turned back by the same angles and

    dx = (g - mean(g) - n * mean(g * n)) / sqrt(var(x) + eps)

The angles are given as tables of cosines and sines, shared by all heads and layers and without
gradients.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import HAS_TRITON, run, unit

__all__ = ["qk_norm_rope", "qk_norm_rope_reference"]

# ---------------------------------------------------------------------------- PyTorch reference


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """What `qk_norm_rope` computes, in plain PyTorch; float64 is taken too, and kept."""

    def one(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return _turned(F.layer_norm(x.to(wide), x.shape[-1:], eps=eps), cos, sin).to(x.dtype)

    return one(q), one(k)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, N, H, d) with its pairs turned by the angles, (N, d / 2) or (B, N, d / 2)."""
    cos, sin = (
        cos.to(x.dtype).unsqueeze(-2),
        sin.to(x.dtype).unsqueeze(-2),
    )  # the same for all heads
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def _backward_reference(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    def one(x: Tensor, dy: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        n, g = centred * rstd, _turned(dy.to(wide), cos, -sin)
        dx = (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) * rstd
        return dx.to(x.dtype)

    return one(q, dq), one(k, dk)


# ------------------------------------------------------------------------------- Triton kernels

MAX_WIDTH = 1024  # of a head, whose features stay in registers; heads are 64 to 128 wide

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _pairs(ptr, offset, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        """Return the even and the odd features (ROWS, WIDTH / 2) of a tile that is read whole."""
        x = tl.load(ptr + offset, mask, other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))

    @triton.jit
    def _store_pairs(ptr, offset, mask, even, odd, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        x = tl.reshape(tl.join(even, odd), [ROWS, WIDTH])
        tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask)

    @triton.jit
    def _norm(even, odd, kept, D, eps):
        """Return both halves of the normalised tile, masked to zero, and 1 / sqrt(var + eps)."""
        mean = (tl.sum(even + odd, axis=1) / D)[:, None]
        even, odd = tl.where(kept, even - mean, 0.0), tl.where(kept, odd - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(even * even + odd * odd, axis=1) / D + eps)[:, None]
        return even * rstd, odd * rstd, rstd

    @triton.jit
    def _kernel(
        out_q_ptr, out_k_ptr, q_ptr, k_ptr, dq_ptr, dk_ptr, cos_ptr, sin_ptr,
        N, eps, q_b, q_n, k_b, k_n, dq_b, dq_n, dk_b, dk_n, cos_b, sin_b,
        H: tl.constexpr, D: tl.constexpr,
        q_h: tl.constexpr, k_h: tl.constexpr, dq_h: tl.constexpr, dk_h: tl.constexpr,
        BACKWARD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program per ROWS heads of one sample; the heads of a token are adjacent.

        Writes q and k normed and turned, or their gradients if BACKWARD. The sizes of a head are
        compiled in: Triton specialises arguments on multiples of 16 only, and would load heads of
        72 features element by element.
        """
        tiles = tl.cdiv(N * H, ROWS)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
        token, head = (row // H).to(tl.int64)[:, None], (row % H)[:, None]
        real = (row < N * H)[:, None]
        col, half = tl.arange(0, WIDTH)[None, :], tl.arange(0, WIDTH // 2)[None, :]
        mask, kept = real & (col < D), real & (half < D // 2)

        cos = tl.load(cos_ptr + b * cos_b + token * (D // 2) + half, kept, other=0.0)
        sin = tl.load(sin_ptr + b * sin_b + token * (D // 2) + half, kept, other=0.0)
        out = (b * N * H + row.to(tl.int64)[:, None]) * D + col
        for i in tl.static_range(2):  # q, then k, under the same angles
            if i == 0:
                even, odd = _pairs(
                    q_ptr, b * q_b + token * q_n + head * q_h + col, mask, ROWS, WIDTH
                )
            else:
                even, odd = _pairs(
                    k_ptr, b * k_b + token * k_n + head * k_h + col, mask, ROWS, WIDTH
                )
            even, odd, rstd = _norm(even, odd, kept, D, eps)
            if BACKWARD:
                if i == 0:
                    at = b * dq_b + token * dq_n + head * dq_h + col
                    dy_even, dy_odd = _pairs(dq_ptr, at, mask, ROWS, WIDTH)
                else:
                    at = b * dk_b + token * dk_n + head * dk_h + col
                    dy_even, dy_odd = _pairs(dk_ptr, at, mask, ROWS, WIDTH)
                g_even, g_odd = dy_even * cos + dy_odd * sin, dy_odd * cos - dy_even * sin
                mean_g = (tl.sum(g_even + g_odd, axis=1) / D)[:, None]
                mean_gn = (tl.sum(g_even * even + g_odd * odd, axis=1) / D)[:, None]
                new_even = (g_even - mean_g - even * mean_gn) * rstd
                new_odd = (g_odd - mean_g - odd * mean_gn) * rstd
            else:
                new_even, new_odd = even * cos - odd * sin, odd * cos + even * sin
            if i == 0:
                _store_pairs(out_q_ptr, out, mask, new_even, new_odd, ROWS, WIDTH)
            else:
                _store_pairs(out_k_ptr, out, mask, new_even, new_odd, ROWS, WIDTH)


def _tile(head_dim: int) -> tuple[int, int]:
    """Return padded width and heads of a tile: 16 elements a thread of q, then as many of k."""
    width = max(2, 1 << (head_dim - 1).bit_length())
    return width, max(1, 2048 // width)


def _launch(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, eps: float, back: bool
) -> tuple[Tensor, Tensor]:
    q, k, dq, dk = unit(q), unit(k), unit(dq), unit(dk)
    cos, sin = cos.contiguous(), sin.contiguous()
    B, N, H, D = q.shape
    width, rows = _tile(D)
    out_q, out_k = q.new_empty(q.shape), q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        _kernel[(B * triton.cdiv(N * H, rows),)](
            out_q, out_k, q, k, dq, dk, cos, sin, N, eps,
            *q.stride()[:2], *k.stride()[:2], *dq.stride()[:2], *dk.stride()[:2],
            *(t.stride(0) if t.ndim == 3 else 0 for t in (cos, sin)),
            H=H, D=D, q_h=q.stride(2), k_h=k.stride(2), dq_h=dq.stride(2), dk_h=dk.stride(2),
            BACKWARD=back, ROWS=rows, WIDTH=width, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out_q, out_k


def _forward_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(q, k, q, k, cos, sin, eps, back=False)


def _backward_triton(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(q, k, dq, dk, cos, sin, eps, back=True)


# ------------------------------------------------------------------------------ public function


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """LayerNorm of each head of q and k without affine, then the rotary embedding of its pairs.

    Runs the Triton kernel on CUDA tensors and the PyTorch reference elsewhere. Differentiable once
    in `q` and `k`; `torch.compile` keeps it whole.

    Args:
        q: queries (B, N, H, d), d even, float32, bfloat16 or float16, of any strides. Views of one
            projection to q, k and v are read in place.
        k: keys, like `q`.
        cos: cosines of the angles of the pairs, float32 (N, d / 2), or (B, N, d / 2) if samples
            differ in their positions. `rotary_2d` returns those of a grid.
        sin: sines, like `cos`.
        eps: added to the variance; FiT uses 1e-6.

    Returns:
        q and k, each (B, N, H, d), contiguous, in the dtype of `q`; computed in float32.

    Raises:
        ValueError: a shape or device does not match, or `eps` is not positive.
        TypeError: an input is not a tensor, its dtype is not supported, the dtypes of q and k
            differ, or the tables are not float32.

    Source: FiTv2 (Wang et al. 2024) on the rotary embedding of RoFormer (Su et al. 2021).
    """
    _common.check_tensors(q=q, k=k, cos=cos, sin=sin)
    return _qk_norm_rope(q, k, cos, sin, eps)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float) -> None:
    if q.ndim != 4 or q.shape[-1] == 0 or q.shape[-1] % 2:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (B, N, H, d) with d even")
    _common.check_dtype("q", q)
    if not eps > 0:
        raise ValueError(f"eps is {eps}, expected a positive number such as 1e-6")
    B, N, _, d = q.shape
    _common.check_like(q, {"k": k}, "(B, N, H, d)", q.shape, "q")
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape not in ((N, d // 2), (B, N, d // 2)):
            given = f"{name} has shape {tuple(t.shape)}"
            raise ValueError(f"{given}, expected {(N, d // 2)} or {(B, N, d // 2)} from q")
        if t.dtype != torch.float32:
            raise TypeError(f"{name} is {t.dtype}, expected float32 whatever the dtype of q")
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device} and q on {q.device}: move it to q's device")


@torch.library.custom_op("accelkit::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin, eps)
    out = run(
        "qk_norm_rope", _forward_triton, qk_norm_rope_reference,
        q, k, cos, sin, eps, max_width=MAX_WIDTH,
    )  # fmt: skip
    return out[0].contiguous(), out[1].contiguous()


@torch.library.custom_op("accelkit::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out = run(
        "qk_norm_rope", _backward_triton, _backward_reference,
        q, k, dq, dk, cos, sin, eps, max_width=MAX_WIDTH,
    )  # fmt: skip
    return out[0].contiguous(), out[1].contiguous()


@_qk_norm_rope.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin, eps)
    return q.new_empty(q.shape), q.new_empty(q.shape)


@_qk_norm_rope_backward.register_fake
def _(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    q, k, cos, sin = ctx.saved_tensors
    new_q, new_k = _qk_norm_rope_backward(dq, dk, q, k, cos, sin, ctx.eps)
    return new_q, new_k, None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_setup_context)
