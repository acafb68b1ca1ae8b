"""Which blocks of a model a schedule counts: one file per family, found by class.

A family is added by subclassing :class:`Backbone` and registering it; nothing else asks what class
a model is.
"""

from accelkit.backbones.base import Backbone, backbone_of, denoiser_of, register
from accelkit.backbones.dit import DiT

register("DiTTransformer2DModel", DiT)

__all__ = ["Backbone", "DiT", "backbone_of", "denoiser_of", "register"]
