"""The small network behind the digit features, trained by ``benchmarks.digit_classifier``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from accelkit.data.digits import SIZE

VERSION = "1"
NAME = f"digit-cnn-v{VERSION}"
FEATURES = 64
CLASSES = 10
SPATIAL_LAYERS = 5  # up to the third convolution, 8x8 places, without its activation
SPATIAL_CHANNELS = 4
SPATIAL_FEATURES = SPATIAL_CHANNELS * (SIZE // 4) ** 2


class DigitClassifier(nn.Module):
    """Four convolutions, a linear bottleneck of 64 features and a linear head: 99k parameters.

    The features are the bottleneck's output before its activation: a sum of many terms, closer to
    the Gaussian that a Fréchet distance assumes than the output of a ReLU, half of which is zero.
    There is no normalisation, so an image's features do not depend on other images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.bottleneck = nn.Linear(64 * (SIZE // 8) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, grey: Tensor) -> Tensor:
        """Map (n, 1, 32, 32) in [-1, 1] to (n, 64)."""
        return self.bottleneck(self.convs(grey))

    def forward(self, grey: Tensor) -> Tensor:
        """Map (n, 1, 32, 32) in [-1, 1] to logits, (n, 10)."""
        return self.head(functional.relu(self.features(grey)))

    def all_features(self, grey: Tensor) -> dict[str, Tensor]:
        """Map (n, 1, 32, 32) in [-1, 1] to the rows of a feature extractor.

        "pooled" is (n, 64) and "probabilities" (n, 10). "spatial", (n, 256), is the first four
        channels of the third convolution at its 8x8 places (the fifth is constant). As with the
        seven channels that ADM takes of an Inception network for its sFID, this is halfway up,
        where places still count, and few enough that 1,000 images have a covariance of full rank.
        """
        halfway = self.convs[:SPATIAL_LAYERS](grey)
        pooled = self.bottleneck(self.convs[SPATIAL_LAYERS:](halfway))
        return {
            "pooled": pooled,
            "spatial": halfway[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1),
            "probabilities": self.head(functional.relu(pooled)).softmax(dim=1),
        }


def to_grey(images: np.ndarray) -> Tensor:
    """Map uint8 RGB (n, h, w, 3) to the mean of the channels in [-1, 1], float32 (n, 1, h, w)."""
    return torch.from_numpy(images.mean(axis=-1, dtype=np.float32)[:, None] / 127.5 - 1)
