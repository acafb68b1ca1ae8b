"""Images to train on and to measure against: sources, transforms and cached latents."""

from accelkit.data.sources import ImageSource, open_source

__all__ = ["ImageSource", "open_source"]
