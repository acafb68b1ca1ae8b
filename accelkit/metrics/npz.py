"""References in numpy's zipped form: statistics of features, images, or both."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from accelkit.errors import AccelkitError
from accelkit.metrics.frechet import Gaussian

IMAGES = "arr_0"
POOLED = ("mu", "sigma")
SPATIAL = ("mu_s", "sigma_s")
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    ValueError,
    EOFError,
    KeyError,
    NotImplementedError,
)


def read_statistics(path: Path, names: tuple[str, str], width: int) -> Gaussian | None:
    """Return what a mean (width,) and a covariance (width, width) say, None if not in there.

    Raises:
        AccelkitError: the file cannot be read, the statistics are of another width, or they are
            no mean and covariance.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not set(names) <= set(file.files):
                return None
            mean, cov = (np.asarray(file[name], dtype=np.float64) for name in names)
    except (*_BROKEN, TypeError) as error:
        raise _unreadable(path, error) from error
    if mean.shape != (width,) or cov.shape != (width, width):
        raise AccelkitError(
            f"the statistics {' and '.join(names)} in {path} have shapes {mean.shape} and "
            f"{cov.shape}, the extractor's features {(width,)} and {(width, width)}; give those "
            "of the same extractor"
        )
    return Gaussian.of(mean, cov, (f"{names[0]} in {path}", f"{names[1]} in {path}"))


def image_shape(path: Path) -> tuple[int, ...] | None:
    """Return the shape (n, height, width, 3) of the uint8 images, None if there are none.

    Raises:
        AccelkitError: the file cannot be read, or holds an array of something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{IMAGES}.npy" not in archive.namelist():
                return None
            with archive.open(f"{IMAGES}.npy") as file:
                shape, fortran, dtype = _header(file)
    except _BROKEN as error:
        raise _unreadable(path, error) from error
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or not shape[0]:
        raise AccelkitError(
            f"{IMAGES} in {path} is {dtype} of shape {shape}, expected images: uint8 "
            "(n, height, width, 3) in C order"
        )
    return shape


def iter_images(path: Path, batch: int) -> Iterator[np.ndarray]:
    """Yield the images, uint8 (n, height, width, 3), of which ``batch`` at a time are held.

    Raises:
        AccelkitError: the file is cut short or broken.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
            shape, _, _ = _header(file)
            for start in range(0, shape[0], batch):
                size = (min(batch, shape[0] - start), *shape[1:])
                data = file.read(int(np.prod(size)))
                yield np.frombuffer(data, dtype=np.uint8).reshape(size)
    except _BROKEN as error:
        raise _unreadable(path, error) from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"array format {version}")


def _unreadable(path: Path, error: Exception) -> AccelkitError:
    return AccelkitError(
        f"cannot read the reference {path} ({type(error).__name__}: {error}); expected an .npz of "
        f"{' and '.join(POOLED)}, of {IMAGES}, or of both"
    )
