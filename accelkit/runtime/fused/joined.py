"""Parameters of several layers in one storage, so that one product serves them all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from accelkit.backbones import stale


class Joined:
    """Parameters concatenated in one storage, of which each is a view.

    They keep their identities and values and can be written to in place. No second copy is kept.

    Args:
        parameters: equal in all dimensions but the first, along which they are joined.

    Attributes:
        whole: all of them as one tensor, without gradients.
        seen: whether they are still views of it; moving or casting a model separates them.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor cannot be trained
            self.whole = torch.cat([p.data for p in self._parameters])
            self._views = self.whole.split([len(p) for p in self._parameters])
            for parameter, view in zip(self._parameters, self._views, strict=True):
                parameter.data = view
        self.seen = stale.places(self._parameters)

    def separate(self) -> None:
        """Give each parameter its own storage again."""
        with torch.inference_mode(False), torch.no_grad():
            for parameter, view in zip(self._parameters, self._views, strict=True):
                if parameter.data_ptr() == view.data_ptr():
                    parameter.data = parameter.data.clone()
