"""Feature extractors by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from accelkit.metrics.features import DigitFeatures, FeatureExtractor, check_recorded
from accelkit.metrics.fidelity import FidelityFeatures
from accelkit.metrics.torchscript import TorchScriptFeatures


def open_extractor(
    spec: str | Path,
    sha256: str | None = None,
    *,
    image_size: int = 299,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """Return a feature extractor, its weights loaded.

    Args:
        spec: ``digits``, the network that comes with accelkit; ``torch-fidelity``, that package's
            Inception (extra ``fid``); or the path of a TorchScript file, such as
            ``inception-2015-12-05.pt``, which StyleGAN3 and EDM use.
        sha256: the weights' hash as recorded with earlier results, in hex; None to take any. A file
            with another hash is not loaded, because a TorchScript file is a program.
        image_size: pixels a side of the images, with which a TorchScript file is tried.
        device: device that the network runs on; ``digits`` always runs on the CPU.

    Raises:
        AccelkitError: no extractor has that name; its weights are missing, damaged or not the
            recorded ones; or a package is missing.
    """
    if spec == "digits":
        check_recorded(DigitFeatures.name, DigitFeatures.sha256, sha256)
        return _digits()
    if spec == "torch-fidelity":
        return FidelityFeatures(device, sha256)
    return TorchScriptFeatures(Path(spec), image_size, device, sha256)


@cache
def _digits() -> DigitFeatures:
    return DigitFeatures()
