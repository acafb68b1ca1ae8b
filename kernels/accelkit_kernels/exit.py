"""The end of a diffusion transformer in one kernel: norm, modulation, projection, un-patchify.

For the D features of token (r, c) of sample b, patches of p x p and C output channels:

    n = (x - mean(x)) / sqrt(var(x) + eps)                Ba, Kiros & Hinton 2016, eq. 3
    h = n * (1 + scale[b]) + shift[b]                     Peebles & Xie 2023, adaLN
    y[b, ch, r p + i, c p + j] = h . weight[(i p + j) C + ch] + bias[(i p + j) C + ch]

for the pixels i, j of a patch, which is how DiT and U-ViT order the rows of their last layer. Only
the first channels need to be computed where a sampler ignores the rest, such as a learned variance.
A norm with weight w and bias v has scale = w - 1 and shift = v, the same for every sample, which
may be given as `expand`ed vectors.

The kernel is for inference: where gradients are recorded, the PyTorch reference runs.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import HAS_TRITON, run, unit

__all__ = ["exit_head", "exit_head_reference"]

# ---------------------------------------------------------------------------- PyTorch reference


def exit_head_reference(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    patch: int,
    channels: int | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """What `exit_head` computes, in plain PyTorch; float64 is taken too, and kept."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)  # (B, N, D)
    h = (normed * (1 + scale.to(wide)[:, None]) + shift.to(wide)[:, None]).to(x.dtype)

    weight = weight.unflatten(0, (patch * patch, -1))[:, :channels]  # (p p, channels, D)
    if bias is not None:
        bias = bias.unflatten(0, (patch * patch, -1))[:, :channels].flatten()
    kept = weight.shape[1]
    y = F.linear(h, weight.flatten(0, 1), bias)  # (B, N, p p channels)
    y = y.reshape(-1, *grid, patch, patch, kept).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(-1, kept, grid[0] * patch, grid[1] * patch)


# ------------------------------------------------------------------------------- Triton kernel

# A program reads TOKENS tokens twice, STEP features at a time, so that no width spills; the second
# reading is meant for the cache, as they take 72 KiB for DiT-XL in bfloat16. Constants, so that a
# sample does not depend on its batch.
TOKENS, STEP, WARPS, STAGES = 32, 128, 4, 2

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        y_ptr, x_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr,
        N, D, COLUMNS, eps, x_b, x_n, shift_b, scale_b, weight_o,
        PATCH: tl.constexpr, ALL: tl.constexpr, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
        WIDEN: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr,
    ):  # fmt: skip
        """One program per tile of TOKENS tokens of one sample by OUTPUTS pixels of a patch.

        WIDEN is for the interpreter, which multiplies bfloat16 as if it were integers.
        """
        tiles = tl.cdiv(N, TOKENS)
        b = (tl.program_id(0) // tiles).to(tl.int64)
        token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
        real = (token < N)[:, None]
        row_at = x_ptr + b * x_b + token.to(tl.int64)[:, None] * x_n
        k = tl.arange(0, STEP)

        # Mean and sum of squares about it, step by step (Chan, Golub & LeVeque 1979, eq. 2.1).
        mean = tl.zeros([TOKENS], tl.float32)
        squares = tl.zeros([TOKENS], tl.float32)
        for first in range(0, D, STEP):
            mask = real & (first + k < D)[None, :]
            x = tl.load(row_at + (first + k)[None, :], mask, other=0.0).to(tl.float32)
            count = min(STEP, D - first)
            step_mean = tl.sum(x, axis=1) / count
            centred = tl.where(mask, x - step_mean[:, None], 0.0)
            delta = step_mean - mean
            share = count / (first + count)
            mean += delta * share
            squares += tl.sum(centred * centred, axis=1) + delta * delta * (first * share)
        rstd = tl.rsqrt(squares / D + eps)

        # Outputs in the order channel, pixel: those of one row of pixels are then adjacent.
        output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        channel, pixel = output // (PATCH * PATCH), output % (PATCH * PATCH)
        kept = channel < CHANNELS
        feature = pixel * ALL + channel  # a row of the weight
        total = tl.zeros([TOKENS, OUTPUTS], tl.float32)
        for first in range(0, D, STEP):
            inside = first + k < D
            x_at = row_at + (first + k)[None, :]
            x = tl.load(x_at, real & inside[None, :], other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + b * shift_b + first + k, inside, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + b * scale_b + first + k, inside, other=0.0).to(tl.float32)
            h = (x - mean[:, None]) * rstd[:, None] * (1.0 + scale)[None, :] + shift[None, :]
            h = h.to(weight_ptr.dtype.element_ty)  # as a linear layer of that dtype takes it
            w_at = weight_ptr + feature.to(tl.int64)[None, :] * weight_o + (first + k)[:, None]
            w = tl.load(w_at, kept[None, :] & inside[:, None], other=0.0)
            if WIDEN:
                h, w = h.to(tl.float32), w.to(tl.float32)
            total = tl.dot(h, w, total, input_precision="ieee")
        if HAS_BIAS:
            total += tl.load(bias_ptr + feature, kept, other=0.0).to(tl.float32)[None, :]

        top, left = (token // COLUMNS) * PATCH, (token % COLUMNS) * PATCH
        line = (b * CHANNELS + channel)[None, :] * (N // COLUMNS * PATCH)
        line += top[:, None] + (pixel // PATCH)[None, :]
        y_at = y_ptr + line * (COLUMNS * PATCH) + left[:, None] + (pixel % PATCH)[None, :]
        tl.store(y_at, total.to(y_ptr.dtype.element_ty), real & kept[None, :])


def _outputs(count: int, dtype: torch.dtype) -> int:
    """Return how many outputs a tile has: a power of two, at least the 16 of a matrix product.

    Other programs compute the other outputs and read x again. In float32, where the product is not
    left to tensor cores, 32 outputs spill on sm_86 and 64 on sm_80.
    """
    most = 16 if dtype == torch.float32 else 64
    return min(most, max(16, 1 << (count - 1).bit_length()))


def _forward_triton(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    patch: int,
    channels: int,
    eps: float,
) -> Tensor:
    x, shift, scale, weight = unit(x), unit(shift), unit(scale), unit(weight)
    B, N, D = x.shape
    y = x.new_empty(B, channels, grid[0] * patch, grid[1] * patch)
    count = patch * patch * channels
    outputs = _outputs(count, x.dtype)
    with torch.cuda.device_of(x):
        _forward_kernel[(B * triton.cdiv(N, TOKENS), triton.cdiv(count, outputs))](
            y, x, shift, scale, weight, weight if bias is None else bias.contiguous(),
            N, D, grid[1], eps,
            x.stride(0), x.stride(1), shift.stride(0), scale.stride(0), weight.stride(0),
            PATCH=patch, ALL=weight.shape[0] // patch**2, CHANNELS=channels,
            HAS_BIAS=bias is not None, WIDEN=_common.INTERPRETED,
            TOKENS=TOKENS, OUTPUTS=outputs, STEP=STEP,
            num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
        )  # fmt: skip
    return y


# ------------------------------------------------------------------------------ public function


def exit_head(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    patch: int,
    channels: int | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Norm, modulation and last linear layer of the tokens, un-patchified into an image.

    Runs the Triton kernel on CUDA tensors, and the PyTorch reference elsewhere and where gradients
    are recorded. `torch.compile` keeps it whole.

    Args:
        x: tokens (B, N, D) of the patches, row by row, float32, bfloat16 or float16, of any
            strides. Slice off leading tokens that are not patches, which copies nothing.
        shift: (B, D), dtype and device of `x`.
        scale: (B, D), dtype and device of `x`.
        weight: (patch^2 C, D), its rows ordered by pixel of the patch, then channel.
        bias: (patch^2 C,) or None.
        grid: rows and columns of patches, whose product is N.
        patch: pixels along a side of a patch.
        channels: how many of the C channels to return, the first ones; None for all.
        eps: added to the variance; DiT uses 1e-6, U-ViT 1e-5.

    Returns:
        (B, channels, rows * patch, columns * patch), contiguous, in the dtype of `x`. Norm and sums
        are float32; the modulated tokens are rounded to the dtype of `x` in between.

    Raises:
        ValueError: a shape, size or device does not match, or `eps` is not positive.
        TypeError: an input is not a tensor, or its dtype is not supported or not that of `x`.

    Source: the final layer of DiT (Peebles & Xie 2023, section 3.2, "Transformer decoder").
    """
    given = {"x": x, "shift": shift, "scale": scale, "weight": weight}
    given |= {} if bias is None else {"bias": bias}
    _common.check_tensors(**given)
    rows, columns = grid
    if channels is None:
        channels = len(weight) // max(1, patch * patch) if weight.ndim else 0
    _check(x, shift, scale, weight, bias, rows, columns, patch, channels, eps)
    if _common.records_gradients(*given.values()):
        return exit_head_reference(x, shift, scale, weight, bias, grid, patch, channels, eps)
    return _exit_head(x, shift, scale, weight, bias, rows, columns, patch, channels, eps)


def _check(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    patch: int,
    channels: int,
    eps: float,
) -> None:
    _common.check_tokens(x, eps)
    B, N, D = x.shape
    _common.check_like(x, {"shift": shift, "scale": scale}, "(B, D)", (B, D))
    if rows < 1 or columns < 1 or rows * columns != N:
        raise ValueError(f"grid is {rows} x {columns}, expected a grid of the {N} tokens of x")
    if patch < 1:
        raise ValueError(f"patch is {patch}, expected at least 1")
    outputs, area = weight.shape[0] if weight.ndim else 0, patch * patch
    if weight.ndim != 2 or weight.shape[1] != D or outputs == 0 or outputs % area:
        shape = f"weight has shape {tuple(weight.shape)}"
        raise ValueError(f"{shape}, expected ({area} C, {D}) for patches of {patch} x {patch}")
    _common.check_like(x, {"weight": weight}, "(p p C, D)", (outputs, D))
    _common.check_like(weight, {"bias": bias}, "(p p C,)", (outputs,), "weight")
    if not 1 <= channels <= outputs // area:
        raise ValueError(f"channels is {channels}, expected 1 to {outputs // area}")


@torch.library.custom_op("accelkit::exit_head", mutates_args=())
def _exit_head(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    patch: int,
    channels: int,
    eps: float,
) -> Tensor:
    return run(
        "exit_head", _forward_triton, exit_head_reference,
        x, shift, scale, weight, bias, (rows, columns), patch, channels, eps,
    ).contiguous()  # fmt: skip


@_exit_head.register_fake
def _(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    patch: int,
    channels: int,
    eps: float,
) -> Tensor:
    return x.new_empty(x.shape[0], channels, rows * patch, columns * patch)
