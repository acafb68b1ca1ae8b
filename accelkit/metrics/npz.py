"""References in numpy's ``.npz`` files: statistics of features, images, or both."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from accelkit.errors import AccelkitError
from accelkit.metrics.frechet import Gaussian

IMAGES = "arr_0"
POOLED = ("mu", "sigma")
SPATIAL = ("mu_s", "sigma_s")


def read_statistics(path: Path, names: tuple[str, str], width: int) -> Gaussian | None:
    """Return a mean (width,) and a covariance (width, width), or None if the file has none.

    Raises:
        AccelkitError: the file cannot be read, the statistics have another width, or they are no
            mean and covariance.
    """
    with _reading(path):
        headers = {name: _member(path, name) for name in names}
        if None in headers.values():
            return None
        for name, header in headers.items():
            if header is not None and header[2].kind not in "fiu":
                raise ValueError(f"{name} is of dtype {header[2]}")
    shapes = [header[0] for header in headers.values() if header is not None]
    if shapes != [(width,), (width, width)]:  # before memory is allocated for the claimed sizes
        raise AccelkitError(
            f"the statistics {' and '.join(names)} in {path} have shapes {shapes[0]} and "
            f"{shapes[1]}, the extractor's features {(width,)} and {(width, width)}; give those "
            "of the same extractor"
        )
    with _reading(path), np.load(path, allow_pickle=False) as file:
        mean, cov = (np.asarray(file[name], dtype=np.float64) for name in names)
    return Gaussian.of(mean, cov, (f"{names[0]} in {path}", f"{names[1]} in {path}"))


def image_shape(path: Path) -> tuple[int, ...] | None:
    """Return the shape (n, height, width, 3) of the uint8 images, or None if there are none.

    Raises:
        AccelkitError: the file cannot be read, or its array does not hold images.
    """
    with _reading(path):
        header = _member(path, IMAGES)
    if header is None:
        return None
    shape, fortran, dtype = header
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or not shape[0]:
        raise AccelkitError(
            f"{IMAGES} in {path} is {dtype} of shape {shape}, expected images: uint8 "
            "(n, height, width, 3) in C order"
        )
    return shape


def iter_images(path: Path, batch: int) -> Iterator[np.ndarray]:
    """Yield the images, uint8 (n, height, width, 3), ``batch`` at a time.

    Raises:
        AccelkitError: the file is cut short or broken.
    """
    with (
        _reading(path),
        zipfile.ZipFile(path) as archive,
        archive.open(f"{IMAGES}.npy") as file,
    ):
        shape, _, _ = _header(file)
        for start in range(0, shape[0], batch):
            size = (min(batch, shape[0] - start), *shape[1:])
            data = file.read(math.prod(size))
            yield np.frombuffer(data, dtype=np.uint8).reshape(size)


def _member(path: Path, name: str) -> tuple[tuple[int, ...], bool, Any] | None:
    """Return shape, order and dtype of an array, or None if it is not there.

    Raises:
        Exception: the array cannot be read, or its size is not the one that its header claims.
    """
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        with archive.open(f"{name}.npy") as file:
            shape, fortran, dtype = _header(file)
            claimed = file.tell() + math.prod(shape) * dtype.itemsize
        found = archive.getinfo(f"{name}.npy").file_size
    if min(shape, default=0) < 0 or (claimed != found and not dtype.hasobject):
        raise ValueError(f"{name} claims {claimed:,} bytes and has {found:,}")
    return shape, fortran, dtype


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"array format {version}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except AccelkitError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for a broken archive
        raise AccelkitError(
            f"cannot read the reference {path} ({type(error).__name__}: {error}); expected an "
            f".npz of {' and '.join(POOLED)}, of {IMAGES}, or of both"
        ) from error
