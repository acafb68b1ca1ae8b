"""Features from torch-fidelity's Inception network, the extra ``fid``."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

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

_LAYERS = ["2048", "logits_unbiased"]
_CHANNELS = 7


class FidelityFeatures(FeatureExtractor):
    """The Inception network of 2015 of torch-fidelity, with its resizing as in TensorFlow.

    "pooled" are the 2048 features of the last pooling and "probabilities" those of 1008 classes,
    without the last layer's bias. "spatial" are the 7 x 17 x 17 values from which ADM's suite
    computes its sFID: the first seven channels of ``mixed_6/conv``, here the 1x1 branch of
    Mixed_6d. That name belongs to the branch's last operation, so they are taken after
    normalisation and activation; places run before channels, as in ADM's published statistics.

    It runs in float32, without TF32. The weights are downloaded once into torch.hub's folder.

    Args:
        device: device that the network runs on.
        sha256: SHA-256 of the weights, in hex, compared before they are loaded; None to take any.

    Raises:
        AccelkitError: torch-fidelity or torchvision cannot be imported, or the weights cannot be
            downloaded or have another hash.
    """

    name = "torch-fidelity inception-v3-compat"
    dim = 2048
    spatial_dim = _CHANNELS * 17 * 17
    resize = "bilinear 299, as in TensorFlow 1"

    def __init__(self, device: torch.device | str = "cpu", sha256: str | None = None) -> None:
        try:
            import torch_fidelity
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except Exception as error:  # a torchvision built for another torch fails in many ways
            raise AccelkitError(
                f"torch-fidelity cannot be imported ({type(error).__name__}: {error}); "
                "pip install 'accelkit[fid]', with a torchvision that was built for this torch, or "
                "give a TorchScript file, which needs neither"
            ) from error
        weights = _downloaded(inception.URL_INCEPTION_V3)
        self.version, self.sha256 = torch_fidelity.__version__, sum_of_file(weights)
        check_recorded(self.name, self.sha256, sha256)
        _refuse_damaged(weights, self.sha256)
        self._device = device
        self._model = inception.FeatureExtractorInceptionV3(
            "inception-v3-compat", _LAYERS, feature_extractor_weights_path=str(weights)
        ).to(device)
        self._spatial: Tensor | None = None
        self._model.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: Any, arguments: Any, output: Tensor) -> None:
        self._spatial = output[:, :_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def run(self, images: np.ndarray) -> dict[str, Tensor]:
        """Map uint8 (n, height, width, 3) to "pooled", "spatial" and "probabilities"."""
        pooled, logits = self._model(to_channels_first(images, self._device))
        spatial, self._spatial = self._spatial, None
        assert spatial is not None
        return {"pooled": pooled, "spatial": spatial, "probabilities": logits.softmax(dim=1)}


def _downloaded(url: str) -> Path:
    """Return the file of weights, downloaded if necessary; its name holds the hash's start."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    start = path.stem.rsplit("-", 1)[1]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=start, progress=False)
        except (OSError, RuntimeError) as error:
            raise AccelkitError(
                f"cannot download torch-fidelity's weights ({error}); put {url} at {path}"
            ) from error
    return path


def _refuse_damaged(path: Path, sha256: str) -> None:
    """Refuse damaged weights.

    torch-fidelity unpickles any object, so the file is read here first, as weights only.
    """
    try:
        start = path.stem.rsplit("-", 1)[1]
        if not sha256.startswith(start):
            raise ValueError(f"the SHA-256 does not start with {start}")
        torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise AccelkitError(
            f"the weights {path} are damaged ({error}); remove them to download them again"
        ) from error
