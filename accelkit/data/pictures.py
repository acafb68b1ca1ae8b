"""One picture: the formats that are read, and how it is brought to size."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from accelkit.data.words import refusal

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}

UNREAD = {
    *(".apng", ".avif", ".exr", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl"),
    *(".pgm", ".pnm", ".ppm", ".svg", ".tga", ".tif", ".tiff"),
}
"""Pictures as well, but in formats that differ between readers or hold several pictures."""

MOST_BYTES = 256 * 2**20
"""Size of a picture's file: as many pixels as Pillow takes without a warning, uncompressed."""

_FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What content may be, whatever its suffix; Pillow hands others to programs, as PostScript."""

_MOST_PIXELS = 2 * 89_478_485
"""What a picture may be enlarged to: as many as Pillow reads."""


def decode(content: bytes, size: int) -> np.ndarray:
    """Return a picture's file as RGB uint8 (size, size, 3); see :func:`crop_and_resize`."""
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        return crop_and_resize(image, size)


def crop_and_resize(image: Image.Image, size: int) -> np.ndarray:
    """Return RGB uint8 (size, size, 3): shorter side resized to ``size``, centre cropped.

    As in ADM (Dhariwal and Nichol 2021) and DiT: halved by averaging while twice too large, then
    bicubic. Transparency is dropped and EXIF orientation ignored, as there; grey of 16 bits is
    scaled to 8.

    Raises:
        AccelkitError: the picture is of floating-point numbers, whose white it does not name, or so
            narrow that it would be enlarged beyond what the memory holds.
    """
    if image.mode == "F":
        raise refusal("its pixels are floating-point numbers; save it with 8 bits")
    if image.mode.startswith("I"):  # which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    if wide * high > _MOST_PIXELS:
        raise refusal(f"it is {image.width}x{image.height}, too narrow for {size}x{size}; crop it")
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]
