"""Feature extractors: fixed networks that map images to vectors, which distances compare."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from accelkit.errors import AccelkitError
from accelkit.metrics import digit_classifier

_DIGIT_WEIGHTS = Path(__file__).parents[1] / "assets" / "digit_features.safetensors"
_DIGIT_SHA256 = "7bef49de328daa9089e878ee0bcee5f8506c397688b994080a04bcd683bea9b1"


class FeatureExtractor(ABC):
    """A fixed map from images to feature vectors.

    Distances are comparable only between results of the same ``name`` and ``sha256``; report both
    with every number.
    """

    name: str
    """The network and its version, as reported with results."""
    version: str
    sha256: str
    """SHA-256 of the weights file, in hex."""
    dim: int
    """Width of the pooled features."""
    spatial_dim: int | None = None
    """Width of the spatial features, None without."""
    size: int | None = None
    """Pixels a side that images must have; None if the network resizes them."""
    resize: str
    """Method that brings images to the size of the network's input."""
    missing: Mapping[str, str] = {}
    """Reasons for the absence of "spatial" or "probabilities"."""

    batch = 64
    """Images that the network is run on at a time."""

    @abstractmethod
    def run(self, images: np.ndarray) -> dict[str, Tensor]:
        """Map one batch of uint8 images (n, height, width, 3) to rows, as :meth:`extract`."""

    def extract(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Map uint8 images (n, height, width, 3) to rows of float32.

        Returns:
            "pooled", (n, dim); if the network has them, "spatial", (n, spatial_dim), the places of
            an intermediate layer, and "probabilities" of classes, (n, K).

        Raises:
            TypeError: ``images`` is not a uint8 array.
            AccelkitError: the network does not take images of this shape.
        """
        check_images(images, self.size)
        starts = range(0, max(len(images), 1), self.batch)
        # the 11 bits of TF32 in place of float32's 24 would show in a distance
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False)
        with torch.inference_mode(), exact:
            found = [self.run(images[i : i + self.batch]) for i in starts]
            names = found[0]
            return {
                name: torch.cat([f[name].float().cpu() for f in found]).numpy() for name in names
            }

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Map uint8 images of shape (n, height, width, 3) to float32 features of shape (n, dim)."""
        return self.extract(images)["pooled"]

    def record(self) -> dict[str, Any]:
        """Return the data to report with every figure: name, version, sha256, dim and resize."""
        names = ("name", "version", "sha256", "dim", "resize")
        return {name: getattr(self, name) for name in names}


class DigitFeatures(FeatureExtractor):
    """Features of the 32x32 handwritten digits, from a small classifier that comes with accelkit.

    The network (:mod:`accelkit.metrics.digit_classifier`) was trained on 80% of the digits, over
    which the 64 features have unit variance. Fréchet distances are about 0.7 between random halves
    of the 1,797 digits, 0.1 to 0.2 between 1,000 of them and all, 15 for noise of deviation 50
    added to every pixel, 53 for a single class, and over 500 for pure noise. Their scale is not
    that of FID, which they do not replace.

    It runs in float32 on the CPU, in batches of a fixed size, so that neither the device that made
    the samples nor the number passed at once changes a result by more than rounding.

    Raises:
        AccelkitError: the weights file is missing, or is not the one of this version.
    """

    name = digit_classifier.NAME
    version = digit_classifier.VERSION
    sha256 = _DIGIT_SHA256
    dim = digit_classifier.FEATURES
    spatial_dim = digit_classifier.SPATIAL_FEATURES
    size = digit_classifier.SIZE
    resize = "none"
    batch = 256

    def __init__(self, weights: Path = _DIGIT_WEIGHTS) -> None:
        self._model = digit_classifier.DigitClassifier().eval()
        self._model.load_state_dict(load(_verified(weights, self.sha256)))

    def run(self, images: np.ndarray) -> dict[str, Tensor]:
        """Map uint8 (n, 32, 32, 3) to rows of 64 pooled, 256 spatial and 10 probabilities."""
        return self._model.all_features(digit_classifier.to_grey(images))


def to_channels_first(images: np.ndarray, device: torch.device | str) -> Tensor:
    """Map uint8 (n, height, width, 3) to uint8 (n, 3, height, width) on ``device``."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)


def check_recorded(name: str, found: str, recorded: str | None) -> None:
    """Raise AccelkitError if the SHA-256 of weights is not the recorded one, if any."""
    if recorded is not None and recorded.lower() != found:
        raise AccelkitError(
            f"the weights of {name} have SHA-256 {found[:12]}…, those recorded {recorded[:12]}…; "
            "give the file of the recorded results"
        )


def _verified(path: Path, sha256: str) -> bytes:
    if not path.is_file():
        raise AccelkitError(f"the feature weights {path} are missing; reinstall accelkit")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise AccelkitError(
            f"the feature weights {path} have SHA-256 {found[:12]}…, expected {sha256[:12]}…; "
            "reinstall accelkit"
        )
    return data


def check_images(images: Any, size: int | None = None) -> None:
    """Refuse images that are not uint8 (n, size, size, 3), or (n, height, width, 3) without a size.

    Other sizes are not resized: the filter would change the distance more than the model does.

    Raises:
        TypeError: ``images`` is not a uint8 array.
        AccelkitError: the array has another shape.
    """
    if not isinstance(images, np.ndarray):
        raise TypeError(
            f"images are a {type(images).__name__}, expected a numpy array of uint8; convert first"
        )
    if images.dtype != np.uint8:
        raise TypeError(f"images are {images.dtype}, expected uint8; scale to 0..255 and round")
    if size is None and (images.ndim != 4 or images.shape[-1] != 3):
        raise AccelkitError(
            f"images have shape {images.shape}, expected (n, height, width, 3): RGB"
        )
    if size is not None and (images.ndim != 4 or images.shape[1:] != (size, size, 3)):
        raise AccelkitError(
            f"images have shape {images.shape}, expected (n, {size}, {size}, 3): RGB of "
            f"{size}x{size} pixels; generate at that size, resizing would change the distance"
        )
