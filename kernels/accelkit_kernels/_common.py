"""What the operations share: checks of inputs, kernel or reference, tiles, sums.

An operation's kernel runs on CUDA tensors, and on CPU tensors under Triton's interpreter. Where it
cannot (no Triton, a GPU too old for the dtype, a compilation that fails) one warning says why and
the PyTorch reference runs.
"""
# ruff: noqa: N803  (the sizes of a formula, and Triton's compile-time arguments, keep their case)

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def _triton_problem() -> str | None:
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        return "Triton is not installed" if error.name == "triton" else f"Triton lacks {error.name}"
    except Exception as error:  # a library of another system, say
        first = next(iter(str(error).strip().splitlines()), "no message")
        return f"Triton cannot be imported ({type(error).__name__}: {first})"
    return None


TRITON_PROBLEM = _triton_problem()
"""Why there is no Triton, None if there is."""
HAS_TRITON = TRITON_PROBLEM is None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# -------------------------------------------------------------------------------------- checks


def check_tensors(**tensors: object) -> None:
    """Raises TypeError for what is no tensor, before torch's dispatcher does so less clearly."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a torch.Tensor")


def check_dtype(name: str, x: Tensor) -> None:
    """Raises TypeError for a dtype that the kernels do not take."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected float32, bfloat16 or float16")


def check_tokens(x: Tensor, eps: float | None = None) -> None:
    """Raises for an x that is not (B, N, D) of a dtype the kernels take, and for an eps <= 0."""
    if x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, N, D) with D at least 1")
    check_dtype("x", x)
    if eps is not None and not eps > 0:
        raise ValueError(f"eps is {eps}, expected a positive number such as 1e-6")


def check_beside(
    tensors: Mapping[str, Tensor | None],
    x: Tensor,
    sizes: str,
    expected: Sequence[int],
    of: str = "x",
    dtype: torch.dtype | None = None,
) -> None:
    """Raises unless each tensor has shape `expected`, called `sizes`, and x's device and dtype.

    `of` is what x is called in a message. The dtype is that of x, unless `dtype` names another.
    None stands for an optional tensor that is not given.
    """
    for name, t in tensors.items():
        if t is None:
            continue
        if t.shape != torch.Size(expected):
            given = f"{name} has shape {tuple(t.shape)}"
            from_x = f"from {of} {tuple(x.shape)}"
            raise ValueError(f"{given}, expected {sizes} = {tuple(expected)} {from_x}")
        if dtype is not None and t.dtype != dtype:
            raise TypeError(f"{name} is {t.dtype}, expected {dtype}")
        if dtype is None and t.dtype != x.dtype:
            raise TypeError(f"{name} is {t.dtype} and {of} is {x.dtype}: cast them to one dtype")
        if t.device != x.device:
            where = f"{name} is on {t.device} and {of} on {x.device}"
            raise ValueError(f"{where}: move it to {of}'s device")


# -------------------------------------------------------------------------- kernel or reference

_warned: set[tuple[str, str]] = set()
_failed: set[tuple[object, ...]] = set()


def _warn_once(operation: str, reason: str) -> None:
    if (operation, reason) not in _warned:
        _warned.add((operation, reason))
        message = f"accelkit_kernels.{operation} runs its PyTorch reference: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def kernel_serves(x: Tensor, max_width: int | None = None, operation: str = "") -> bool:
    """Whether a kernel, whose tile is at most `max_width` features wide, runs on tensors like x."""
    if x.numel() == 0 or (max_width is not None and x.shape[-1] > max_width):
        return False
    if not x.is_cuda:
        return HAS_TRITON and INTERPRETED
    if not HAS_TRITON:
        _warn_once(operation, str(TRITON_PROBLEM))
        return False
    if x.dtype == torch.bfloat16 and _capability(x.device) < (8, 0):
        _warn_once(operation, "bfloat16 needs a GPU of compute capability 8.0 or later")
        return False
    return True


def run(
    operation: str,
    kernel: Callable[..., T],
    reference: Callable[..., T],
    x: Tensor,
    *rest: object,
    max_width: int | None = None,
) -> T:
    """`kernel(x, *rest)` where it serves; elsewhere, or where Triton fails, `reference(x, *rest)`.

    Interpreted kernels raise instead: a test must not compare the reference with itself.
    """
    key = (operation, kernel, x.device, x.dtype, x.shape[-1])
    if key in _failed or not kernel_serves(x, max_width, operation):
        return reference(x, *rest)
    try:
        return kernel(x, *rest)
    except torch.OutOfMemoryError:
        raise  # the reference needs no less
    except Exception as error:  # Triton, its compilers and the driver raise what they please
        if INTERPRETED:
            raise
        _failed.add(key)  # a compilation that fails is slow, and would fail again
        first = next(iter(str(error).strip().splitlines()), "no message")
        _warn_once(operation, f"Triton failed with {type(error).__name__}: {first}")
    return reference(x, *rest)


def unit(t: Tensor) -> Tensor:
    """`t` with its last dimension contiguous: the kernels take any other stride as it is."""
    return t if t.stride(-1) == 1 else t.contiguous()


# --------------------------------------------------------------------------------------- tiles

# Tokens whose share of a vector's gradient one program adds up. Partial sums then move about 1/12
# of the bytes of the pass in bfloat16. Fixed, so that a gradient does not depend on the batch size.
CHUNK = 32


def tile(features: int) -> tuple[int, int, int]:
    """(padded width, tokens, warps) of the tile that one program of a norm holds.

    Eight elements a thread, since eight bfloat16 are the 16 bytes of one vector load; sixteen at
    the largest width, where 32 warps would leave a thread 64 registers and the backward spills.
    """
    width = 1 << (features - 1).bit_length()
    tokens = max(1, min(CHUNK, 2048 // width))
    return width, tokens, max(1, min(16, width * tokens // 256))


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def normalise(x, mask, D, eps):
        """The normalised tile (TOKENS, WIDTH), zero where masked, and 1 / sqrt(var + eps)."""
        centred = tl.where(mask, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)[:, None]
        return centred * rstd, rstd

    @triton.jit
    def _sum_kernel(
        first_ptr, second_ptr, third_ptr, partial_ptr, chunks, D,
        COUNT: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program adds WIDTH features of one of COUNT vectors of one sample, by chunks."""
        b = tl.program_id(0).to(tl.int64)
        vector = tl.program_id(2)
        col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        kept = col < D
        total = tl.zeros([WIDTH], tl.float32)
        for chunk in range(chunks):
            at = partial_ptr + ((b * chunks + chunk) * COUNT + vector) * D + col
            total += tl.load(at, kept, other=0.0)
        total = total.to(first_ptr.dtype.element_ty)
        if vector == 0:
            tl.store(first_ptr + b * D + col, total, kept)
        elif vector == 1:
            tl.store(second_ptr + b * D + col, total, kept)
        else:
            tl.store(third_ptr + b * D + col, total, kept)

    # With TRITON_INTERPRET=1, which Triton reads as it decorates, a kernel runs on CPU tensors.
    INTERPRETED = not isinstance(_sum_kernel, triton.JITFunction)
else:
    INTERPRETED = False


def sum_chunks(partial: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Partial sums (B, chunks, 1 to 3, D) in float32, added over the chunks: a (B, D) for each.

    The second stage of a sum over tokens, always in the same order, which atomic additions are not.
    """
    B, chunks, count, D = partial.shape
    sums = [partial.new_empty(B, D, dtype=dtype) for _ in range(count)]
    _sum_kernel[(B, triton.cdiv(D, 256), count)](
        sums[0], sums[min(1, count - 1)], sums[-1], partial, chunks, D,
        COUNT=count, WIDTH=256, enable_fp_fusion=True,
    )  # fmt: skip
    return sums
