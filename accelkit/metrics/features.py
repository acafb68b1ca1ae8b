"""Named feature extractors: fixed networks that turn images into what distances compare."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from accelkit.errors import AccelkitError
from accelkit.metrics import digit_classifier

_BATCH = 256
_DIGIT_WEIGHTS = Path(__file__).parents[1] / "assets" / "digit_features.safetensors"
_DIGIT_SHA256 = "7bef49de328daa9089e878ee0bcee5f8506c397688b994080a04bcd683bea9b1"


class FeatureExtractor(ABC):
    """A fixed map from images to feature vectors.

    Distances are comparable only between results of the same ``name`` and ``sha256``; both belong
    beside every number reported.
    """

    name: str
    """The network and its version, as reported with results."""
    version: str
    sha256: str
    """SHA-256 of the weights file, in hex."""
    dim: int
    """Width of the features."""

    @abstractmethod
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Map uint8 images of shape (n, height, width, 3) to float32 features of shape (n, dim)."""


class DigitFeatures(FeatureExtractor):
    """Features of the 32x32 handwritten digits, from a small classifier that comes with accelkit.

    It was trained on 80% of the digits (see :mod:`accelkit.metrics.digit_classifier`). The 64
    features have unit variance over those. Fréchet distances are then about 0.7 between random
    halves of the 1,797 digits, 0.1 to 0.2 between 1,000 of them and all, 15 for noise of deviation
    50 added to every pixel, 53 for a single class, and over 500 for pure noise. They are no
    substitute for FID: their scale is their own.

    It runs in float32 on the CPU, in batches of its own, so that neither the device the samples
    were made on nor how many are passed at once changes a result by more than rounding.

    Raises:
        AccelkitError: if the weights file is missing or is not the one this version came with.
    """

    name = digit_classifier.NAME
    version = digit_classifier.VERSION
    sha256 = _DIGIT_SHA256
    dim = digit_classifier.FEATURES

    def __init__(self, weights: Path = _DIGIT_WEIGHTS) -> None:
        self._model = digit_classifier.DigitClassifier().eval()
        self._model.load_state_dict(load(_verified(weights, self.sha256)))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Map uint8 (n, 32, 32, 3) to float32 (n, 64).

        Raises:
            TypeError: if ``images`` is not a uint8 array.
            AccelkitError: if it has another shape.
        """
        return self._run(self._model.features, images, self.dim)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Map uint8 (n, 32, 32, 3) to the ten classes' probabilities, float32 (n, 10).

        Raises:
            TypeError: if ``images`` is not a uint8 array.
            AccelkitError: if it has another shape.
        """
        return self._run(lambda x: self._model(x).softmax(dim=1), images, digit_classifier.CLASSES)

    def _run(
        self, function: Callable[[Tensor], Tensor], images: np.ndarray, width: int
    ) -> np.ndarray:
        _check_images(images, digit_classifier.SIZE)
        out = np.empty((len(images), width), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), _BATCH):
                rows = slice(start, start + _BATCH)
                out[rows] = function(digit_classifier.to_grey(images[rows])).numpy()
        return out


_EXTRACTORS: dict[str, Callable[[], FeatureExtractor]] = {"digits": DigitFeatures}


@cache
def extractor(name: str = "digits") -> FeatureExtractor:
    """Return the feature extractor registered as ``name``, its weights loaded and verified once.

    Raises:
        AccelkitError: if there is none of that name, or its weights are missing or damaged.
    """
    if name not in _EXTRACTORS:
        known = ", ".join(sorted(_EXTRACTORS))
        raise AccelkitError(f"no feature extractor is called {name!r}; choose one of: {known}")
    return _EXTRACTORS[name]()


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


def _check_images(images: Any, size: int) -> None:
    """Refuse what is not uint8 (n, size, size, 3).

    Other sizes are not resized: the filter would change the distance more than the model measured.
    """
    if not isinstance(images, np.ndarray):
        raise TypeError(
            f"images are a {type(images).__name__}, expected a numpy array of uint8; convert first"
        )
    if images.dtype != np.uint8:
        raise TypeError(f"images are {images.dtype}, expected uint8; scale to 0..255 and round")
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise AccelkitError(
            f"images have shape {images.shape}, expected (n, {size}, {size}, 3): RGB of "
            f"{size}x{size} pixels; generate at that size, resizing would change the distance"
        )
