"""diffusers' DiT pipeline for label tables of any size, and for networks in pixels.

diffusers' own guides away from label 1000, whatever the network's table, and needs an autoencoder.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from accelkit.errors import AccelkitError

_NULL = 1000  # the null class of diffusers' pipeline


class DiTPipeline(diffusers.DiTPipeline):
    """Images from a DiT with any number of classes.

    Unlike diffusers' pipeline, it guides away from the network's own null class and may have no
    autoencoder. It is saved under the same name in the same files, which
    :func:`accelkit.from_pretrained` opens. diffusers opens them too, but with tables of other than
    1,000 classes its own pipeline can only sample without guidance (``guidance_scale=1``).
    """

    _optional_components = ["vae"]  # noqa: RUF012 - diffusers' own

    def __init__(
        self,
        transformer: Any,
        vae: Any | None,
        scheduler: Any,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__(transformer, vae, scheduler, id2label)

    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Sample images, as diffusers' ``DiTPipeline`` does.

        Args:
            class_labels: a class for each image.
            guidance_scale: above 1, samples are guided away from the null class.
            generator, num_inference_steps, output_type, return_dict: as in diffusers.

        Raises:
            AccelkitError: a label is not one of the network's classes, or guidance is asked of a
                network that was never trained without labels.
        """
        guided = guidance_scale > 1
        null = self._null_class(class_labels, guided)
        own: Any = copy.copy(self)  # Calls in other threads do not see its changes.
        vars(own)["maybe_free_model_hooks"] = self.maybe_free_model_hooks
        if guided and null is not None and null != _NULL:
            vars(own)["transformer"] = _Unlabelled(self.transformer, null)
        if self.vae is None:
            vars(own)["vae"] = _PIXELS
        return super(DiTPipeline, own).__call__(
            class_labels, guidance_scale, generator, num_inference_steps, output_type, return_dict
        )

    def _null_class(self, labels: Sequence[int], guided: bool) -> int | None:
        from accelkit.backbones import backbone_of, denoiser_of

        backbone = backbone_of(denoiser_of(self))
        null, count = backbone.null_class, backbone.num_classes or 0
        if guided and null is None:
            raise AccelkitError(
                f"this {type(backbone.model).__name__} was never trained without labels, so there "
                "is nothing to guide away from; give guidance_scale=1"
            )
        last = count - 1 if null is None else null
        if outside := [n for n in torch.tensor(labels).flatten().tolist() if not 0 <= n <= last]:
            raise AccelkitError(f"the model has classes 0 to {count - 1}, got {outside[0]}")
        return null


class _Unlabelled(nn.Module):
    """A network that gets the null class in the second half of a batch, diffusers' order."""

    def __init__(self, network: nn.Module, null: int) -> None:
        super().__init__()
        self.network, self.null = network, null

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        labels = class_labels.clone()
        labels[len(labels) // 2 :] = self.null
        return self.network(latents, timestep=timestep, class_labels=labels)


_PIXELS = SimpleNamespace(
    config=SimpleNamespace(scaling_factor=1.0),
    decode=lambda latents: SimpleNamespace(sample=latents),
)
"""A stand-in for the autoencoder where the latents are the pictures."""


def dit_pipeline_for(network: Any, vae: Any | None) -> type[diffusers.DiTPipeline]:
    """Return diffusers' class of pipelines for a DiT if it samples correctly, otherwise ours."""
    from accelkit.backbones import backbone_of

    if backbone_of(network).null_class == _NULL and vae is not None:
        return diffusers.DiTPipeline
    return DiTPipeline
