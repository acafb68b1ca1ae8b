"""Which blocks of a model a schedule counts: one file per family, found by class.

To add a family, subclass :class:`Backbone` and register it; no other code depends on the class of a
model.
"""

# Importing a family registers it.
from accelkit.backbones import flux, hunyuan, pixart, sana, sd3, unet, uvit, wan  # noqa: F401
from accelkit.backbones.base import Backbone
from accelkit.backbones.dit import DiT
from accelkit.backbones.registry import backbone_of, called_by, denoiser_of, register_backbone

__all__ = ["Backbone", "DiT", "backbone_of", "called_by", "denoiser_of", "register_backbone"]
