"""Pictures and pipelines that jobs write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from accelkit.files.tensors import add_sums
from accelkit.files.writing import RESUME, writing


def save_picture(pixels: Any, path: Path, go_on: str = RESUME) -> None:
    """Write uint8 pixels (H, W, 3) as a PNG; see :func:`accelkit.files.writing.writing`."""
    with writing(path, go_on, durable=False) as part:  # accelkit never reads it back
        Image.fromarray(pixels).save(part, format="png")


def save_pipeline(pipe: Any, path: Path, go_on: str = RESUME) -> None:
    """Write a pipeline or network by its ``save_pretrained``, with checksums, to ``path``."""
    with writing(path, go_on) as part:
        pipe.save_pretrained(part)
        add_sums(part)
