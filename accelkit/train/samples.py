"""Training data as the loop reads it: samples and their conditions."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from accelkit.backbones import Backbone
from accelkit.backbones.conditioning import Rows
from accelkit.errors import AccelkitError


class Samples(Protocol):
    """Training samples: latents drawn from their posteriors."""

    @property
    def labels(self) -> Tensor | None:
        """Class of each sample, int64 (n,), or None."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W)."""

    def __len__(self) -> int: ...

    def sample(self, indices: Tensor, noise: Tensor) -> Tensor:
        """Return latents (B, C, H, W) of the samples ``indices`` for standard normal ``noise``."""


class Conditions(Protocol):
    """Conditions of samples."""

    def rows(self, indices: Tensor, drop: Tensor) -> Rows:
        """Return B rows for the samples ``indices`` (B,), unconditional where ``drop``."""


class Labels:
    """Classes as conditions; a model without classes has none.

    Args:
        labels: class of each sample, int64 (n,), or None.
        backbone: backbone of the model.

    Raises:
        AccelkitError: the samples have no classes, and the model cannot do without.
    """

    def __init__(self, labels: Tensor | None, backbone: Backbone) -> None:
        self.labels, self.null = labels, backbone.null_class
        self.classes = backbone.num_classes
        if labels is None and self.null is None and self.classes is not None:
            raise AccelkitError(
                f"this {type(backbone.model).__name__} needs a class for every image, as it has no "
                "class for unlabelled ones; give images in a folder per class"
            )

    def rows(self, indices: Tensor, drop: Tensor) -> Rows:
        """Return the samples' class labels, dropped if the model has a class for no label."""
        if self.classes is None:
            return {}
        if self.null is None:
            assert self.labels is not None
            return {"class_labels": self.labels[indices]}
        kept = torch.full_like(indices, self.null) if self.labels is None else self.labels[indices]
        return {"class_labels": torch.where(drop, self.null, kept)}
