"""Which blocks of a model a schedule counts: one file per family, found by class.

A family is added by subclassing :class:`Backbone` and registering it; nothing else asks what class
a model is.
"""

from accelkit.backbones.base import Backbone, backbone_of, called_by, denoiser_of, register_backbone
from accelkit.backbones.dit import DiT

register_backbone("DiTTransformer2DModel", DiT)

__all__ = ["Backbone", "DiT", "backbone_of", "called_by", "denoiser_of", "register_backbone"]
