"""Networks that no library provides, in the form of diffusers', and their pipelines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelkit.models.dit_pipeline import DiTPipeline, dit_pipeline_for
    from accelkit.models.uvit import PUBLISHED, UViTTransformer2DModel
    from accelkit.models.uvit_pipeline import UViTPipeline

_LAZY = {
    "DiTPipeline": "accelkit.models.dit_pipeline",
    "dit_pipeline_for": "accelkit.models.dit_pipeline",
    "PUBLISHED": "accelkit.models.uvit",
    "UViTTransformer2DModel": "accelkit.models.uvit",
    "UViTPipeline": "accelkit.models.uvit_pipeline",
}

__all__ = ["PUBLISHED", "DiTPipeline", "UViTPipeline", "UViTTransformer2DModel", "dit_pipeline_for"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'accelkit.models' has no attribute {name!r}")
