"""Features from any TorchScript file, such as the Inception network of StyleGAN3 and EDM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from accelkit.errors import AccelkitError
from accelkit.files.writing import sum_of_file
from accelkit.metrics.features import (
    FeatureExtractor,
    check_recorded,
    to_channels_first,
)

_FEATURES = "return_features"
_PROBABILITIES = "no_output_bias"


class TorchScriptFeatures(FeatureExtractor):
    """Features of a TorchScript file, which takes uint8 images (n, 3, H, W) and resizes them.

    If its ``forward`` has the argument ``return_features``, as that of ``inception-2015-12-05.pt``
    of StyleGAN3 and EDM (2048 features, 1008 classes), it is called with it for the features, and
    with ``no_output_bias`` for the classes' probabilities. Any other is called with the images
    alone and returns the features. It runs in float32, without TF32, and needs no torchvision.

    Args:
        path: the file.
        image_size: pixels a side of the images; the file is tried with this size.
        device: device that the network runs on.
        sha256: SHA-256 of the file, in hex, compared before it is loaded; None to take any.

    Raises:
        AccelkitError: the file is missing, has another hash, is no TorchScript, or does not map
            images to features.
    """

    resize = "in the TorchScript file"

    def __init__(
        self,
        path: Path,
        image_size: int,
        device: torch.device | str = "cpu",
        sha256: str | None = None,
    ) -> None:
        if not path.is_file():
            raise AccelkitError(
                f"no feature extractor and no file is called {str(path)!r}; choose one of: "
                "digits, torch-fidelity, the path of a TorchScript file"
            )
        self.sha256 = sum_of_file(path)
        check_recorded(path.stem, self.sha256, sha256)
        try:
            self._model = torch.jit.load(str(path), map_location=device).eval()
            arguments = {argument.name for argument in self._model.forward.schema.arguments}
        except (RuntimeError, ValueError, OSError, AttributeError) as error:
            raise AccelkitError(
                f"{path} cannot be loaded as TorchScript ({_first_line(error)}); give a file that "
                "torch.jit.save wrote"
            ) from error
        self.name, self.version = path.stem, self.sha256[:12]
        self._device = device
        self._features = {_FEATURES: True} if _FEATURES in arguments else {}
        self._with_classes = bool(self._features) and _PROBABILITIES in arguments
        missing = {"spatial": "a TorchScript file gives no spatial features"}
        if not self._with_classes:
            missing["probabilities"] = f"{path.name} gives no probabilities of classes"
        self.missing = missing
        black = np.zeros((2, image_size, image_size, 3), dtype=np.uint8)
        try:
            found = self.extract(black)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise AccelkitError(
                f"{path} does not map uint8 images of {image_size}x{image_size}, (n, 3, height, "
                f"width), to features ({_first_line(error)}); wrap it in one that does"
            ) from error
        for what, rows in found.items():
            if rows.ndim != 2 or len(rows) != len(black):
                raise AccelkitError(
                    f"{path} makes {what} features of shape {rows.shape} from {len(black)} images, "
                    "expected a row for each; wrap it in one that flattens"
                )
        self.dim = found["pooled"].shape[1]

    def run(self, images: np.ndarray) -> dict[str, Tensor]:
        """Map uint8 (n, height, width, 3) to "pooled", (n, dim), and possibly "probabilities"."""
        x = to_channels_first(images, self._device)
        found = {"pooled": self._model(x, **self._features)}
        if self._with_classes:
            found["probabilities"] = self._model(x, **{_PROBABILITIES: True})
        return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
