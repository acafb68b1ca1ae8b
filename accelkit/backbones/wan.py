"""Wan, text or image to video, in diffusers: ``WanTransformer3DModel`` (Wan Team 2025).

A skipped block runs nothing; the final norm, in float32, runs on the hidden states of the last
block kept, followed by the model's own modulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import NORMALISED, Captions, Rows, refuse_images
from accelkit.backbones.registry import family
from accelkit.errors import AccelkitError


class _WanCaptions(Captions):
    """Images, as videos of one frame, for Wan 2.1's text-to-video models."""

    embedding = Captions.embedding | {"max_sequence_length": 512}
    latent_settings = NORMALISED

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents of 512 x 512 pixels; the config has the channels alone."""
        return self.model.config.in_channels, 64, 64

    def check(self) -> None:
        refuse_images(self.model)

    def suits(self, pipe: Any) -> None:
        super().suits(pipe)
        if getattr(pipe, "transformer_2", None) is not None:
            raise AccelkitError(
                f"this {type(pipe).__name__} has two networks, one for high noise and one for low, "
                "which accelkit does not train or sample by itself"
            )
        if pipe.config.get("expand_timesteps"):
            raise AccelkitError(
                f"this {type(pipe).__name__} gives its network a timestep for every token, so a "
                "sample has no single noise level to schedule"
            )

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        return super().arguments(latents.unsqueeze(2), timestep, rows)

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        return output.squeeze(2)


@family("WanTransformer3DModel", called=_WanCaptions)
class Wan(Backbone):
    """All blocks: self-attention over space and time, cross-attention to text and image, MLP.

    Wan 2.2's larger models are two networks, one for high noise and one for low: enable a schedule
    on ``pipe.transformer_2`` separately, with ``scheduler=pipe.scheduler``.
    """

    family = "wan"
    blocks = "blocks"
    exit = "norm_out"
    time_embedders = ("condition_embedder.time_embedder",)
    timestep_per_token = True
    layout = "BCFHW"
    batched = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image")
    block_batched = ("encoder_hidden_states", "temb")

    def timestep(self, call: dict[str, Any]) -> Any:
        """Return the timestep in the arguments of a model's call.

        Raises:
            AccelkitError: there is one for every token; or samples differ in theirs though each has
                two rows of images, its first and its last.
        """
        timestep = super().timestep(call)
        images, samples = call.get("encoder_hidden_states_image"), call["hidden_states"]
        # Pipelines expand one step, whose stride of 0 shows that there is no other value to read.
        several = isinstance(timestep, torch.Tensor) and any(timestep.stride())
        paired = images is not None and len(images) != len(samples)
        if paired and several and timestep.unique().numel() > 1:
            raise AccelkitError(
                f"a batch of {len(samples)} with a first and a last image for each sample cannot "
                "mix noise levels; give all of them the same timestep"
            )
        return timestep
