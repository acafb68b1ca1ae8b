"""One picture: the formats that are read, and how it is brought to size."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from accelkit.errors import AccelkitError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}

UNREAD = {
    *(".apng", ".avif", ".exr", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl"),
    *(".pgm", ".pnm", ".ppm", ".svg", ".tga", ".tif", ".tiff"),
}
"""Suffixes of formats that readers disagree about, or that hold several pictures."""

MOST_BYTES = 256 * 2**20
"""Largest file of a picture: the pixels that Pillow reads without a warning, uncompressed."""

_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read whatever the suffix; Pillow passes others, as PostScript, to programs."""

_MOST_PIXELS = 2 * 89_478_485
"""Most pixels that a picture may be enlarged to: as many as Pillow reads."""


def decode(content: bytes, size: int) -> np.ndarray:
    """Return a picture's file as RGB uint8 (size, size, 3); see :func:`crop_and_resize`."""
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        return crop_and_resize(image, size)


def crop_and_resize(image: Image.Image, size: int) -> np.ndarray:
    """Return RGB uint8 (size, size, 3): shorter side resized to ``size``, centre cropped.

    As in ADM (Dhariwal and Nichol 2021) and DiT, the picture is halved by averaging while it is
    twice too large, then resized by a bicubic filter; transparency is dropped and EXIF orientation
    ignored. Grey of 16 bits is scaled to 8.

    Raises:
        AccelkitError: the pixels are floating-point numbers, whose white is not known, or the
            picture is so narrow that it would be enlarged beyond the memory.
    """
    if image.mode == "F":
        raise AccelkitError("its pixels are floating-point numbers; save it with 8 bits")
    if image.mode.startswith("I"):  # Pillow would clip it at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    if wide * high > _MOST_PIXELS:
        raise AccelkitError(
            f"it is {image.width}x{image.height}, too narrow for {size}x{size}; crop it"
        )
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]
