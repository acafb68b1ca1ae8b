"""References for generated images: features of real images, cached on disk, or statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelkit.data import shards
from accelkit.data.sources import ImageSource, iter_images, open_source
from accelkit.errors import AccelkitError
from accelkit.files.tensors import load_tensors, write_tensors
from accelkit.files.writing import sum_of_file
from accelkit.metrics import npz
from accelkit.metrics.features import FeatureExtractor
from accelkit.metrics.frechet import Gaussian, Moments
from accelkit.metrics.rows import Batches, Rows

FORMAT = 1
BATCH = 256  # adding a batch to the moments of 2048 features touches 33 MB, whatever its size
_MOMENTS = "moments.safetensors"


@dataclass(frozen=True)
class Reference:
    """Features of real images.

    Attributes:
        name: the name that was given.
        fingerprint: SHA-256 of the images, or of the file of statistics.
        kind: "images", or "statistics" if the moments come from a file.
        n: number of images in ``batches``, None without.
        pooled: mean and root of the covariance of the pooled features.
        spatial: likewise of the spatial features, None if there are none.
        batches: yields "pooled" rows, float32 (n, d), from the disk, on every call; None for
            statistics alone. ADM's reference batches have both, statistics of the whole data
            set and 10,000 of its images.
    """

    name: str
    fingerprint: str
    kind: str
    n: int | None
    pooled: Gaussian
    spatial: Gaussian | None
    batches: Batches | None

    def record(self) -> dict[str, Any]:
        """Return the data to report with every figure: name, fingerprint, kind and n."""
        return {name: getattr(self, name) for name in ("name", "fingerprint", "kind", "n")}


def open_reference(
    spec: str | Path | ImageSource,
    extractor: FeatureExtractor,
    size: int,
    *,
    cache_dir: Path | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """Return the features of real images, from the cache if they are there.

    A folder of the cache is keyed by the images' fingerprint, their size and the extractor's hash.

    Args:
        spec: a data set, an argument of :func:`accelkit.data.sources.open_source`, or an ``.npz``
            with statistics (``mu`` and ``sigma``, as pytorch-fid writes, and ``mu_s`` and
            ``sigma_s`` of spatial features, as ADM does), with images (``arr_0``, uint8
            (n, size, size, 3)), or with both.
        extractor: the feature extractor.
        size: pixels a side of the generated images, to which images are resized; those in an
            ``.npz`` must have it.
        cache_dir: default ``$ACCELKIT_CACHE/features``, else ``~/.cache/accelkit/features``.
        on_images: called with the number of images done and their total.

    Raises:
        AccelkitError: the reference does not exist, cannot be read, has another size or is from
            another extractor, or the cache cannot be written.
    """
    if extractor.size not in (None, size):
        raise AccelkitError(
            f"{extractor.name} takes images of {extractor.size}x{extractor.size}, these are "
            f"{size}x{size}; choose another extractor"
        )
    make = _Maker(extractor, size, cache_dir or shards.default_cache("features"), on_images)
    if not isinstance(spec, ImageSource) and Path(spec).suffix == ".npz":
        return _of_npz(Path(spec), make)
    source = spec if isinstance(spec, ImageSource) else open_source(spec)
    images = (batch for _, batch in iter_images(source, size, BATCH))
    features = make(source.fingerprint, images, len(source), source.skip_bad)
    return features.reference(source.name, source.fingerprint)


def _of_npz(path: Path, make: _Maker) -> Reference:
    if not path.is_file():
        raise AccelkitError(f"no reference at {path}; give an .npz of statistics, or images")
    extractor, size = make.extractor, make.size
    pooled = npz.read_statistics(path, npz.POOLED, extractor.dim)
    spatial = None
    if pooled is not None and extractor.spatial_dim is not None:
        spatial = npz.read_statistics(path, npz.SPATIAL, extractor.spatial_dim)
    shape = npz.image_shape(path)
    if shape is None and pooled is None:
        raise AccelkitError(
            f"{path} holds neither statistics (mu and sigma) nor images (arr_0); "
            "give a reference that does"
        )
    if shape is not None and shape[1:3] != (size, size):
        raise AccelkitError(
            f"the images in {path} are {shape[2]}x{shape[1]}, the generated ones {size}x{size}; "
            "give a reference of their size"
        )
    fingerprint = sum_of_file(path)
    if shape is None:
        assert pooled is not None
        return Reference(str(path), fingerprint, "statistics", None, pooled, spatial, None)
    features = make(fingerprint, npz.iter_images(path, BATCH), shape[0])
    found = features.reference(str(path), fingerprint)
    if pooled is not None:
        found = replace(found, kind="statistics", pooled=pooled, spatial=spatial)
    return found


class _Features:
    """Rows and moments of images in a folder of the cache.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: the folder is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = shards.Shards(folder)
        self.n, self.skipped = len(found), found.index["skipped"]
        moments = {name: m.numpy() for name, m in load_tensors(folder / _MOMENTS).items()}
        self.pooled = Gaussian.of(moments["mu"], moments["sigma"])
        self.spatial = (
            Gaussian.of(moments["mu_s"], moments["sigma_s"]) if "mu_s" in moments else None
        )

    def reference(self, name: str, fingerprint: str) -> Reference:
        return Reference(name, fingerprint, "images", self.n, self.pooled, self.spatial, self.rows)

    def rows(self) -> Iterator[Rows]:
        for batch in shards.in_order(self.folder):
            yield {name: rows.numpy() for name, rows in batch.items()}


@dataclass(frozen=True)
class _Maker:
    """Extracts features of images, or finds them in the cache."""

    extractor: FeatureExtractor
    size: int
    cache: Path
    on_images: Callable[[int, int], None]

    def __call__(
        self, fingerprint: str, images: Iterator[np.ndarray], total: int, skip_bad: bool = False
    ) -> _Features:
        text = f"{fingerprint} {self.size} {self.extractor.name} {self.extractor.sha256} {FORMAT}"
        folder = self.cache / hashlib.sha256(text.encode()).hexdigest()[:16]
        features = shards.kept(
            folder,
            _Features,
            lambda part: self._write(images, total, part),
            "features",
            # an image that an earlier call skipped is an error here, unless it may be skipped again
            lambda found: skip_bad or not found.skipped,
        )
        features.folder = folder
        return features

    def _write(self, images: Iterator[np.ndarray], total: int, part: Path) -> None:
        pooled, spatial = Moments(), Moments()

        def rows() -> Iterator[shards.Rows]:
            for batch in images:
                found = self.extractor.extract(batch)
                pooled.update(found["pooled"])
                if "spatial" in found:
                    spatial.update(found["spatial"])
                yield {"pooled": torch.from_numpy(found["pooled"])}

        index = shards.write(rows(), part, lambda done: self.on_images(done, total))
        if index["count"] < 2:
            raise AccelkitError("a reference takes at least 2 images, this has 1; give more")
        moments = {"mu": pooled.mean, "sigma": pooled.cov}
        if spatial.n:
            moments |= {"mu_s": spatial.mean, "sigma_s": spatial.cov}
        write_tensors(part / _MOMENTS, moments, shards.GO_ON)
        shards.write_index(part, {**index, "skipped": total - index["count"]})
