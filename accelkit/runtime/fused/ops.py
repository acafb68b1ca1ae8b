"""The operations between a block's matrix products, by kernels or by PyTorch's operators.

CUDA tensors run the kernels of ``accelkit_kernels``, others as few of PyTorch's operators as
possible, in place only on tensors made here. No gradients are recorded.

Tokens are x (B, N, D); shift, factor and gate are (B, D), or (1, D) if all samples share them. A
norm is multiplied by 1 + scale: the factor is the scale for the kernels, and the sum for PyTorch's
operators, computed once for a whole table of vectors (:func:`with_factors`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from accelkit.errors import AccelkitWarning

Pending = tuple[Tensor, Tensor | None]
"""A branch's output (B, N, D) and its gate, if any, still to be added to the residual stream."""


def kernels_for(x: Tensor) -> Any:
    """Return the package of kernels if they run on ``x``, None otherwise."""
    if not x.is_cuda or x.dtype == torch.float64:
        return None
    import accelkit_kernels

    if accelkit_kernels.TRITON_PROBLEM is not None:
        _warn(accelkit_kernels.TRITON_PROBLEM)
        return None
    return accelkit_kernels


@cache
def _warn(problem: str) -> None:
    message = f"fused forwards run PyTorch's operators in place of kernels: {problem}"
    warnings.warn(message, AccelkitWarning, stacklevel=2)


def with_factors(table: Tensor, scales: Tensor) -> Tensor:
    """Return vectors (P, R, D) with factors in place of scales; ``table`` may be overwritten.

    Args:
        table: vectors of width D.
        scales: indices of the scales among the R, int64.
    """
    if kernels_for(table):
        return table
    one = table.new_ones(()).expand(table.shape[0], scales.shape[0], table.shape[2])
    return table.index_add_(1, scales, one)


def layernorm_modulate(x: Tensor, shift: Tensor, factor: Tensor, eps: float) -> Tensor:
    """Return the norm of x without affine, times (1 + scale), plus shift."""
    if kernels := kernels_for(x):
        return kernels.layernorm_modulate(x, _each(shift, x), _each(factor, x), eps)
    width = (x.shape[-1],)
    if shift.shape[0] == 1:
        return F.layer_norm(x, width, factor[0], shift[0], eps)
    normal = F.layer_norm(x, width, None, None, eps)
    return torch.addcmul(shift[:, None], normal, factor[:, None], out=normal)


def add(x: Tensor, pending: Pending | None) -> Tensor:
    """Return the residual stream with the pending branch added."""
    if pending is None:
        return x
    y, gate = pending
    if gate is None:
        return x + y
    if kernels := kernels_for(x):
        return kernels.gated_residual(x, y, _each(gate, x))
    return torch.addcmul(x, y, gate[:, None])


def add_layernorm_modulate(
    x: Tensor, pending: Pending | None, shift: Tensor, factor: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the residual stream with the pending branch added, and its modulated norm."""
    if pending is not None and (kernels := kernels_for(x)):
        y, gate = pending
        gate = x.new_ones(1, x.shape[-1]) if gate is None else gate
        return kernels.gated_residual_layernorm_modulate(
            x, y, _each(gate, x), _each(shift, x), _each(factor, x), eps
        )
    x = add(x, pending)
    return x, layernorm_modulate(x, shift, factor, eps)


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear layer followed by the tanh approximation of GELU."""
    kernels = kernels_for(x)
    if kernels is not None and bias is not None:
        return kernels.bias_gelu_tanh(F.linear(x, weight), bias)
    y = F.linear(x, weight, bias)
    if y.dtype != torch.float32 or y.is_cuda:
        return F.gelu(y, approximate="tanh")
    # (1 + tanh(u)) / 2 = sigmoid(2 u): 0.57 of the time of F.gelu's tanh (4096 x 256, one core)
    u = torch.addcmul(y.new_tensor(_LINEAR), y, y, value=_CUBIC).mul_(y).sigmoid_()
    return u.mul_(y)


_LINEAR = 2 * (2 / torch.pi) ** 0.5  # 2 u = y (linear + cubic y^2)
_CUBIC = 0.044715 * _LINEAR


def exit_head(
    x: Tensor,
    shift: Tensor,
    factor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    patch: int,
    eps: float,
) -> Tensor:
    """Return the sample (B, C, H, W): norm, modulation, projection, un-patchify."""
    if kernels := kernels_for(x):
        shift, scale = _each(shift, x), _each(factor, x)
        return kernels.exit_head(x, shift, scale, weight, bias, grid, patch, eps=eps)
    y = F.linear(layernorm_modulate(x, shift, factor, eps), weight, bias)  # (B, N, p p C)
    rows, cols = grid
    y = y.view(y.shape[0], rows, cols, patch, patch, -1)
    return y.permute(0, 5, 1, 3, 2, 4).reshape(y.shape[0], -1, rows * patch, cols * patch)


def skip_linear(x: Tensor, skips: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the projection of x and the skips, each (B, N, D), concatenated."""
    if kernels := kernels_for(x):
        return kernels.skip_linear(x, list(skips), weight, bias)
    return F.linear(torch.cat([x, *skips], dim=-1), weight, bias)


def _each(vector: Tensor, x: Tensor) -> Tensor:
    """Return a row for every sample, without a copy."""
    return vector.expand(x.shape[0], -1)
