"""The long skip of a U-ViT: a linear layer of tokens and skips, without their concatenation.

For tokens x and skips s_1 ... s_k, each with D features, and a weight cut into k + 1 blocks of D
columns, W = [W_0 | W_1 | ... | W_k]:

    y = x W_0^T + s_1 W_1^T + ... + s_k W_k^T + b       Bao et al. 2023, figure 1 and section 3.1

k = 1 is the projection of one decoder block. k > 1 is a run of them folded into one product, as the
projections of dropped blocks are: each is linear in its tokens and its skip. The kernel is a matrix
product whose inner loop walks from one source to the next, which spares writing and reading the
concatenation. It is for inference: where gradients are recorded, the PyTorch reference runs.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from accelkit_kernels import _common
from accelkit_kernels._common import HAS_TRITON, run, unit

__all__ = ["skip_linear", "skip_linear_reference"]

# ---------------------------------------------------------------------------- PyTorch reference


def skip_linear_reference(
    x: Tensor, skip: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What `skip_linear` computes, in plain PyTorch; float64 is taken too, and kept.

    The concatenation is built: on a CPU one product of twice the length takes 0.93 to 1.04 of the
    time of two that add up in place, and less than that of two and a sum.
    """
    return F.linear(torch.cat([x, *_listed(skip)], dim=-1), weight, bias)


def _listed(skip: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [skip] if isinstance(skip, Tensor) else list(skip)


# ------------------------------------------------------------------------------- Triton kernel

# One tile for all sizes, so that a sum over the features is taken in the same order whatever the
# batch. Three stages of it are 96 KiB, which fits the 99 KiB of shared memory of sm_86.
TILE = {"ROWS": 128, "COLS": 128, "STEP": 64, "GROUP": 8}
WARPS, STAGES = 8, 3

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        y_ptr, sources, strides_b, strides_n, weight_ptr, bias_ptr,
        M, N, D, OUT, weight_o,
        SOURCES: tl.constexpr, HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One program per tile of ROWS tokens by COLS outputs; M = B * N tokens in all.

        WIDEN is for the interpreter, which multiplies bfloat16 as if it were integers.
        """
        # GROUP tiles of tokens share the weights of one tile of outputs while these are in L2.
        tiles_m, tiles_o = tl.cdiv(M, ROWS), tl.cdiv(OUT, COLS)
        group = tl.program_id(0) // (GROUP * tiles_o)
        inside = tl.program_id(0) % (GROUP * tiles_o)
        height = min(tiles_m - group * GROUP, GROUP)
        # 32 bits for what a tile has of its own: in 64 the pointers of y alone spill on sm_80.
        row = (group * GROUP + inside % height) * ROWS + tl.arange(0, ROWS)
        col = (inside // height) * COLS + tl.arange(0, COLS)
        b, n, k = (row // N).to(tl.int64), (row % N).to(tl.int64), tl.arange(0, STEP)

        steps = tl.cdiv(D, STEP)
        total = tl.zeros([ROWS, COLS], tl.float32)
        for step in range(SOURCES * steps):
            index = step // steps
            feature = (step % steps) * STEP + k
            source, stride_b, stride_n = sources[0], strides_b[0], strides_n[0]
            for i in tl.static_range(1, SOURCES):
                source = tl.where(index == i, sources[i], source)
                stride_b = tl.where(index == i, strides_b[i], stride_b)
                stride_n = tl.where(index == i, strides_n[i], stride_n)
            x_at = source + (b * stride_b + n * stride_n)[:, None] + feature[None, :]
            x = tl.load(x_at, (row < M)[:, None] & (feature < D)[None, :], other=0.0)
            w_at = weight_ptr + col[None, :] * weight_o + (index * D + feature)[:, None]
            w = tl.load(w_at, (col < OUT)[None, :] & (feature < D)[:, None], other=0.0)
            if WIDEN:
                x, w = x.to(tl.float32), w.to(tl.float32)
            total = tl.dot(x, w, total, input_precision="ieee")

        if HAS_BIAS:
            total += tl.load(bias_ptr + col, col < OUT, other=0.0).to(tl.float32)[None, :]
        y_at = y_ptr + row.to(tl.int64)[:, None] * OUT + col[None, :]
        mask = (row < M)[:, None] & (col < OUT)[None, :]
        tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask)


def _forward_triton(x: Tensor, skips: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    sources = tuple(unit(t) for t in (x, *skips))
    weight = unit(weight)
    B, N, D = x.shape
    M, OUT = B * N, weight.shape[0]
    y = x.new_empty(B, N, OUT)
    programs = triton.cdiv(M, TILE["ROWS"]) * triton.cdiv(OUT, TILE["COLS"])
    with torch.cuda.device_of(x):
        _forward_kernel[(programs,)](
            y, sources, tuple(t.stride(0) for t in sources), tuple(t.stride(1) for t in sources),
            weight, weight if bias is None else bias.contiguous(),
            M, N, D, OUT, weight.stride(0),
            SOURCES=len(sources), HAS_BIAS=bias is not None, WIDEN=_common.INTERPRETED, **TILE,
            num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True,
        )  # fmt: skip
    return y


# ------------------------------------------------------------------------------ public function


def skip_linear(
    x: Tensor, skip: Tensor | Sequence[Tensor], weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Linear layer of [x; skip], or of [x; skip 1; ...; skip k], concatenated along the features.

    Runs the Triton kernel on CUDA tensors in half precision, and the PyTorch reference elsewhere
    and where gradients are recorded. `torch.compile` keeps it whole.

    Args:
        x: tokens (B, N, D), float32, bfloat16 or float16, of any strides.
        skip: one tensor like `x`, or a sequence of one or more, each of any strides.
        weight: (OUT, (k + 1) D) for k skips, the columns of `x` first, as `nn.Linear` stores it.
        bias: (OUT,) or None.

    Returns:
        (B, N, OUT), contiguous, in the dtype of `x`; summed in float32.

    Raises:
        ValueError: a shape or device does not match, or there is no skip.
        TypeError: an input is not a tensor, or its dtype is not supported or not that of `x`.

    Source: the long skip connections of U-ViT (Bao et al. 2023, section 3.1).
    """
    skips = _listed(skip)
    tensors = {"x": x} | {f"skip {i}": s for i, s in enumerate(skips)} | {"weight": weight}
    tensors |= {} if bias is None else {"bias": bias}
    _common.check_tensors(**tensors)
    _check(x, skips, weight, bias)
    # Without a kernel, a custom op would only add the time of its call.
    if _kernel_may_serve(x) and not _common.records_gradients(*tensors.values()):
        return _skip_linear(x, skips, weight, bias)
    return skip_linear_reference(x, skips, weight, bias)


def _kernel_may_serve(x: Tensor) -> bool:
    """In float32 cuBLAS is used: without tensor cores the product outweighs the bytes spared."""
    return (x.is_cuda and x.dtype != torch.float32) or (HAS_TRITON and _common.INTERPRETED)


def _check(x: Tensor, skips: list[Tensor], weight: Tensor, bias: Tensor | None) -> None:
    _common.check_tokens(x)
    if not skips:
        raise ValueError("skip is an empty sequence, expected at least one (B, N, D)")
    named = {f"skip {i}" if len(skips) > 1 else "skip": s for i, s in enumerate(skips)}
    _common.check_like(x, named, "(B, N, D)", x.shape)
    columns = (len(skips) + 1) * x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != columns or weight.shape[0] == 0:
        given = f"weight has shape {tuple(weight.shape)}, expected (OUT, {columns})"
        raise ValueError(f"{given} for x {tuple(x.shape)} and a skip count of {len(skips)}")
    _common.check_like(x, {"weight": weight}, "(OUT, (k + 1) D)", (weight.shape[0], columns))
    _common.check_like(weight, {"bias": bias}, "(OUT,)", weight.shape[:1], "weight")


@torch.library.custom_op("accelkit::skip_linear", mutates_args=())
def _skip_linear(x: Tensor, skips: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    return run(
        "skip_linear", _forward_triton, skip_linear_reference, x, skips, weight, bias
    ).contiguous()


@_skip_linear.register_fake
def _(x: Tensor, skips: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
