"""Which blocks of a model a schedule counts: one file per family, found by class.

A family is added by subclassing :class:`Backbone` and registering it; nothing else asks what class
a model is.
"""

from accelkit.backbones import prompted as _prompted  # noqa: F401 - it registers what it knows
from accelkit.backbones.base import Backbone
from accelkit.backbones.dit import DiT
from accelkit.backbones.flux import Flux
from accelkit.backbones.hunyuan import HunyuanDiT
from accelkit.backbones.pixart import PixArt
from accelkit.backbones.registry import backbone_of, called_by, denoiser_of, register_backbone
from accelkit.backbones.sana import Sana
from accelkit.backbones.sd3 import SD3
from accelkit.backbones.unet import UNet
from accelkit.backbones.uvit import UViT
from accelkit.backbones.wan import Wan

register_backbone("DiTTransformer2DModel", DiT)
register_backbone("FluxTransformer2DModel", Flux)
register_backbone("HunyuanDiT2DModel", HunyuanDiT)
register_backbone("PixArtTransformer2DModel", PixArt)
register_backbone("SanaTransformer2DModel", Sana)
register_backbone("SD3Transformer2DModel", SD3)
register_backbone("UNet2DConditionModel", UNet)
register_backbone("UNet2DModel", UNet)
register_backbone("UViTTransformer2DModel", UViT)
register_backbone("WanTransformer3DModel", Wan)

__all__ = ["Backbone", "DiT", "backbone_of", "called_by", "denoiser_of", "register_backbone"]
