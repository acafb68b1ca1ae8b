"""Checks of inputs, the choice of kernel or reference, tiles and sums, shared by the operations.

An operation's kernel runs on CUDA tensors, and on CPU tensors under Triton's interpreter. Where it
cannot (Triton is missing, the GPU is too old for the dtype, compilation fails), one warning gives
the reason and the PyTorch reference runs.
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
    except Exception as error:  # such as a library built for another system
        first = next(iter(str(error).strip().splitlines()), "no message")
        return f"Triton cannot be imported ({type(error).__name__}: {first})"
    return None


TRITON_PROBLEM = _triton_problem()
"""Why Triton cannot be used; None if it can."""
HAS_TRITON = TRITON_PROBLEM is None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# -------------------------------------------------------------------------------------- checks


def check_tensors(**tensors: object) -> None:
    """Raise TypeError for anything but a tensor, more clearly than torch's dispatcher would."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a torch.Tensor")


def check_dtype(name: str, x: Tensor) -> None:
    """Raise TypeError for a dtype that the kernels do not support."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected float32, bfloat16 or float16")


def check_tokens(x: Tensor, eps: float | None = None) -> None:
    """Raise unless x is (B, N, D) of a supported dtype and eps, if given, is positive."""
    if x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, N, D) with D at least 1")
    check_dtype("x", x)
    if eps is not None and not eps > 0:
        raise ValueError(f"eps is {eps}, expected a positive number such as 1e-6")


def check_like(
    x: Tensor,
    tensors: Mapping[str, Tensor | None],
    sizes: str,
    expected: Sequence[int],
    of: str = "x",
    dtype: torch.dtype | None = None,
) -> None:
    """Raise unless every tensor has the shape `expected`, and x's device and dtype.

    Args:
        x: the tensor to compare with.
        tensors: by name; None stands for an optional one that is not given.
        sizes: the expected shape in letters, for the message.
        expected: the expected shape.
        of: the name of `x` in the message.
        dtype: the expected dtype, if it is not that of `x`.
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


def records_gradients(*tensors: Tensor) -> bool:
    """Whether autograd records an operation on the tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def kernel_serves(x: Tensor, max_width: int | None = None, operation: str = "") -> bool:
    """Whether a kernel for at most `max_width` features can run on tensors like x."""
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
    """Return `kernel(x, *rest)` if it can run and Triton does not fail, else `reference(x, *rest)`.

    An interpreted kernel raises instead: a test must not compare the reference with itself.
    """
    key = (operation, kernel, x.device, x.dtype, x.shape[-1])
    if key in _failed or not kernel_serves(x, max_width, operation):
        return reference(x, *rest)
    try:
        return kernel(x, *rest)
    except torch.OutOfMemoryError:
        raise  # the reference needs as much memory
    except Exception as error:  # Triton, its compilers and the driver share no class of errors
        if INTERPRETED:
            raise
        _failed.add(key)  # a failing compilation is slow, and would fail again
        first = next(iter(str(error).strip().splitlines()), "no message")
        _warn_once(operation, f"Triton failed with {type(error).__name__}: {first}")
    return reference(x, *rest)


def unit(t: Tensor) -> Tensor:
    """Return `t` with its last dimension contiguous; the kernels take any other strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


# --------------------------------------------------------------------------------------- tiles

# Tokens or rows of a program that sums a vector's gradient over them. Partial sums then add about
# 1/12 to the bytes of the pass in bfloat16. A constant, so that a gradient does not depend on the
# batch size.
CHUNK = 32


def tile(features: int) -> tuple[int, int, int]:
    """Return the padded width, tokens and warps of the tile that one program of a norm holds.

    A thread has eight elements, since eight bfloat16 are the 16 bytes of one vector load. At the
    largest width it has sixteen: 32 warps would leave it 64 registers, and `td_norm`'s backward
    kernel would spill.
    """
    width = 1 << (features - 1).bit_length()
    tokens = max(1, min(CHUNK, 2048 // width))
    return width, tokens, max(1, min(16, width * tokens // 256))


if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def normalise(x, mask, D, eps):
        """Return the normalised tile (TOKENS, WIDTH), masked to zero, and 1 / sqrt(var + eps)."""
        centred = tl.where(mask, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)[:, None]
        return centred * rstd, rstd

    @triton.jit
    def _sum_kernel(
        first_ptr, last_ptr, partial_ptr, chunks, D, COUNT: tl.constexpr, WIDTH: tl.constexpr
    ):
        """One program sums WIDTH features of one of COUNT vectors of one sample over the chunks."""
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
        else:
            tl.store(last_ptr + b * D + col, total, kept)

    # Triton reads TRITON_INTERPRET=1 when it decorates a kernel, which then runs on CPU tensors.
    INTERPRETED = not isinstance(_sum_kernel, triton.JITFunction)
else:
    INTERPRETED = False


def sum_chunks(partial: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Sum float32 parts (B, chunks, 1 or 2, D) over the chunks; return (B, D) for each vector.

    This is the second stage of a sum over tokens. It always adds in the same order, unlike atomic
    additions.
    """
    B, chunks, count, D = partial.shape
    sums = [partial.new_empty(B, D, dtype=dtype) for _ in range(count)]
    _sum_kernel[(B, triton.cdiv(D, 256), count)](
        sums[0], sums[-1], partial, chunks, D, COUNT=count, WIDTH=256, enable_fp_fusion=True
    )
    return sums
