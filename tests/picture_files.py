"""Data sets whose pictures can be told apart: picture ``n`` is one grey of level ``n``."""

import io
import zipfile

import numpy as np
from PIL import Image

from accelkit.data.sources import iter_images


def png(level, size=8):
    """Return the file of a grey picture of ``level``, 0 to 255."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (level,) * 3).save(buffer, "png")
    return buffer.getvalue()


def write_folder(path, files):
    """Write files by name, bytes or text."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_zip(path, files, **options):
    """Write the members of a zip, in the order given."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def levels(source):
    """Return the levels of a source's pictures, in its order."""
    return np.concatenate([images[:, 0, 0, 0] for _, images in iter_images(source, 8, 16)]).tolist()


def refused(error):
    """Return whether an error is one line of a readable length."""
    return len(str(error.value)) <= 400 and "\n" not in str(error.value)
