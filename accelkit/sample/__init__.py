"""Sampling with per-image seeds, for the command line and for measuring."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelkit.sample.generate import decode
    from accelkit.sample.samplers import sampler_for

_LAZY = {"decode": "accelkit.sample.generate", "sampler_for": "accelkit.sample.samplers"}

__all__ = ["decode", "sampler_for"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'accelkit.sample' has no attribute {name!r}")
