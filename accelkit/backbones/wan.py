"""Wan, text or image to video, in diffusers: ``WanTransformer3DModel`` (Wan Team 2025).

A skipped block runs nothing; the final norm, in float32, runs on the hidden states of the last
block kept, the model's own modulation behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from accelkit.backbones.base import Backbone
from accelkit.errors import AccelkitError


class Wan(Backbone):
    """All blocks: self-attention over space and time, cross-attention to text and image, MLP.

    Wan 2.2's larger models are two networks, one for high noise and one for low: a schedule is
    enabled on ``pipe.transformer_2`` separately, with ``scheduler=pipe.scheduler``.
    """

    family = "wan"
    timestep_per_token = True
    layout = "BCFHW"
    batched = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image")
    block_batched = ("encoder_hidden_states", "temb")

    @property
    def blocks(self) -> nn.ModuleList:
        """All transformer blocks."""
        return self.model.blocks  # type: ignore[return-value]

    @property
    def exit(self) -> nn.Module:
        """The final layer norm."""
        return self.model.norm_out  # type: ignore[return-value]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The one that all blocks share."""
        return [self.model.condition_embedder.time_embedder]  # type: ignore[union-attr, list-item]

    def timestep(self, call: dict[str, Any]) -> Any:
        """Return the timestep of a model's call.

        Raises:
            AccelkitError: there is one for every token; or samples differ in theirs though each has
                two rows of images, its first and its last.
        """
        timestep = super().timestep(call)
        images, samples = call.get("encoder_hidden_states_image"), call["hidden_states"]
        # a pipeline expands its step, which need not be read to know that it is one
        several = isinstance(timestep, torch.Tensor) and any(timestep.stride())
        paired = images is not None and len(images) != len(samples)
        if paired and several and timestep.unique().numel() > 1:
            raise AccelkitError(
                f"a batch of {len(samples)} with a first and a last image for each sample cannot "
                "mix noise levels; give all of them the same timestep"
            )
        return timestep
