"""Whole forward passes of few, large operations: one file per family, found by class.

A fused forward computes what the model's own does, from the model's own parameters. Queries, keys
and values are one product, the modulations of all blocks another; norm, modulation and residual are
kernels of ``accelkit_kernels`` on a CUDA GPU, and as few of PyTorch's operators as possible
elsewhere. A block with a hook or an unusual part runs as its own module.
"""

from __future__ import annotations

from accelkit.backbones import Backbone
from accelkit.runtime.fused import ops
from accelkit.runtime.fused.base import FusedForward, Pass
from accelkit.runtime.fused.dit import FusedDiT
from accelkit.runtime.fused.pixart import FusedPixArt
from accelkit.runtime.fused.uvit import FusedUViT

_FAMILIES: dict[str, type[FusedForward]] = {
    "dit": FusedDiT,
    "pixart": FusedPixArt,
    "uvit": FusedUViT,
}


def fused_forward(backbone: Backbone) -> FusedForward | None:
    """Return the fused forward of a model, None if its family has none."""
    kind = _FAMILIES.get(backbone.family)
    return None if kind is None else kind(backbone)


def paths(backbone: Backbone) -> list[str]:
    """Return for each block which path it runs by without gradients, and why."""
    fused = fused_forward(backbone)
    if fused is None:
        own = f"own modules: a {backbone.family} has no fused forward"
        return [own] * len(backbone.all_blocks)
    kernels = ops.kernels_for(next(backbone.model.parameters())) is not None
    by = "Triton kernels" if kernels else "PyTorch operators"
    return [
        f"fused, {by}" if reason is None else f"own modules: {reason}" for reason in fused.survey()
    ]


__all__ = ["FusedForward", "Pass", "fused_forward", "paths"]
