"""Networks that no library provides, in the form of diffusers', and their pipelines."""

from accelkit.models.dit_pipeline import DiTPipeline, dit_pipeline_for
from accelkit.models.uvit import PUBLISHED, UViTTransformer2DModel
from accelkit.models.uvit_pipeline import UViTPipeline

__all__ = ["PUBLISHED", "DiTPipeline", "UViTPipeline", "UViTTransformer2DModel", "dit_pipeline_for"]
