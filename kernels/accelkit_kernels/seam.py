"""The seam between two branches of a DiT block: the gated residual of one, the norm of the next.

For a token x of sample b and the branch's output y for it, over its D features:

    h = x + gate[b] * y                           Peebles & Xie 2023, adaLN-Zero's alpha
    n = (h - mean(h)) / sqrt(var(h) + eps)        Ba, Kiros & Hinton 2016, eq. 3 (biased variance)
    m = n * (1 + scale[b]) + shift[b]             Peebles & Xie 2023, adaLN's gamma and beta

The norm reads h as it is stored, rounded to its dtype, so that the two results are those of
`gated_residual` and `layernorm_modulate` in turn. The kernel is for inference: where gradients are
recorded, the PyTorch reference runs.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

import torch
from torch import Tensor

from accelkit_kernels import _common, adaln, gated
from accelkit_kernels._common import HAS_TRITON, run, tile, unit

__all__ = ["gated_residual_layernorm_modulate", "gated_residual_layernorm_modulate_reference"]

# ---------------------------------------------------------------------------- PyTorch reference


def gated_residual_layernorm_modulate_reference(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """What `gated_residual_layernorm_modulate` computes, in plain PyTorch; float64 too, kept."""
    h = gated.gated_residual_reference(x, y, gate)
    return h, adaln.layernorm_modulate_reference(h, shift, scale, eps)


# ------------------------------------------------------------------------------- Triton kernel

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


# ------------------------------------------------------------------------------ public function


def gated_residual_layernorm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`gated_residual(x, y, gate)`, and `layernorm_modulate` of it, in one pass.

    Runs the Triton kernel on CUDA tensors, and the PyTorch reference elsewhere and where gradients
    are recorded. `torch.compile` keeps it whole.

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
        ValueError: a shape or device does not match, or `eps` is not positive.
        TypeError: an input is not a tensor, or its dtype is not supported or not that of `x`.

    Source: adaLN-Zero of DiT (Peebles & Xie 2023, section 3.2), layer norm of Ba et al. 2016.
    """
    vectors = {"gate": gate, "shift": shift, "scale": scale}
    _common.check_tensors(x=x, y=y, **vectors)
    _common.check_tokens(x, eps)
    _common.check_like(x, {"y": y}, "(B, N, D)", x.shape)
    _common.check_like(x, vectors, "(B, D)", (x.shape[0], x.shape[2]))
    if _common.records_gradients(x, y, *vectors.values()):
        h, m = gated_residual_layernorm_modulate_reference(x, y, gate, shift, scale, eps)
        return h.contiguous(), m.contiguous()
    return _seam(x, y, gate, shift, scale, eps)


@torch.library.custom_op("accelkit::gated_residual_layernorm_modulate", mutates_args=())
def _seam(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    h, m = run(
        "gated_residual_layernorm_modulate",
        _forward_triton, gated_residual_layernorm_modulate_reference,
        x, y, gate, shift, scale, eps, max_width=adaln.MAX_WIDTH,
    )  # fmt: skip
    return h.contiguous(), m.contiguous()


@_seam.register_fake
def _(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)
