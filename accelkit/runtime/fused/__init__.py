"""Whole forward passes of few, large operations: one file per family, found by class.

A fused forward computes what the model's own does, from the model's own parameters: queries, keys
and values in one product, what conditions all blocks in another, norm, modulation and residual in
the kernels of ``accelkit_kernels`` on a CUDA GPU and in as few of PyTorch's operators elsewhere. A
block with something unusual on it runs as it is.
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
    """Return the fused forward of a model, None for a family that has none."""
    kind = _FAMILIES.get(backbone.family)
    return None if kind is None else kind(backbone)


def paths(backbone: Backbone) -> list[str]:
    """Return for each of a model's blocks by which path it runs without gradients, and why."""
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
