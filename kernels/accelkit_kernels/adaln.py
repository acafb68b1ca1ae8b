"""Adaptive layer norm: LayerNorm without affine, then the modulation that conditions a DiT block.

For a token x of sample b, over its D features:

    n = (x - mean(x)) / sqrt(var(x) + eps)        Ba, Kiros & Hinton 2016, eq. 3 (biased variance)
    y = n * (1 + scale[b]) + shift[b]             Peebles & Xie 2023, adaLN and adaLN-Zero

The statistics are float32. The kernel is for inference: where gradients are recorded, the PyTorch
reference runs and autograd differentiates it.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import HAS_TRITON, run, tile, unit

__all__ = ["layernorm_modulate", "layernorm_modulate_reference"]

# ---------------------------------------------------------------------------- PyTorch reference


def layernorm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> Tensor:
    """What `layernorm_modulate` computes, in plain PyTorch; float64 is taken too, and kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)  # (B, N, D)
    return (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(x.dtype)


# ------------------------------------------------------------------------------- Triton kernel

# A token's features stay in registers. Compiled for sm_80 to sm_100, neither this kernel nor that
# of seam.py spills at this width; at 16384 the latter does. Wider inputs run the reference.
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


# ------------------------------------------------------------------------------ public function


def layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over the last dimension without affine, times `1 + scale`, plus `shift`.

    Runs the Triton kernel on CUDA tensors, and the PyTorch reference elsewhere and where gradients
    are recorded. `torch.compile` keeps it whole.

    Args:
        x: tokens (B, N, D), float32, bfloat16 or float16, of any strides.
        shift: (B, D), dtype and device of `x`.
        scale: (B, D), dtype and device of `x`.
        eps: added to the variance; DiT uses 1e-6.

    Returns:
        (B, N, D), contiguous, in the dtype of `x`; computed in float32.

    Raises:
        ValueError: a shape or device does not match, or `eps` is not positive.
        TypeError: an input is not a tensor, or its dtype is not supported or not that of `x`.

    Source: adaLN of DiT (Peebles & Xie 2023, section 3.2) on the layer norm of Ba et al. 2016.
    """
    _common.check_tensors(x=x, shift=shift, scale=scale)
    _common.check_tokens(x, eps)
    expected = (x.shape[0], x.shape[2])
    _common.check_like(x, {"shift": shift, "scale": scale}, "(B, D)", expected)
    if _common.records_gradients(x, shift, scale):
        return layernorm_modulate_reference(x, shift, scale, eps).contiguous()
    return _layernorm_modulate(x, shift, scale, eps)


@torch.library.custom_op("accelkit::layernorm_modulate", mutates_args=())
def _layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return run(
        "layernorm_modulate", _forward_triton, layernorm_modulate_reference,
        x, shift, scale, eps, max_width=MAX_WIDTH,
    ).contiguous()  # fmt: skip


@_layernorm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)
