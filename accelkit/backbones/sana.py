"""Sana in diffusers: ``SanaTransformer2DModel`` (Xie et al. 2024).

A skipped block runs nothing; the final modulated norm runs on the hidden states of the last block
kept. Self-attention is linear in the number of tokens, so merging some would save next to nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from accelkit.backbones.base import Backbone


class Sana(Backbone):
    """All blocks: linear self-attention, cross-attention to the caption, convolutional MLP.

    What a block gets as ``timestep`` is the six modulation vectors that the model makes of it.
    """

    family = "sana"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "guidance",
        "encoder_attention_mask",
        "attention_mask",
        "controlnet_block_samples",
    )
    block_batched = (
        "attention_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "timestep",
    )

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config: Any = model.config
        self.timestep_scale = config.timestep_scale
        self._radians = config.guidance_embeds  # of Sana-Sprint, a consistency model

    @property
    def blocks(self) -> nn.ModuleList:
        """All transformer blocks."""
        return self.model.transformer_blocks  # type: ignore[return-value]

    @property
    def exit(self) -> nn.Module:
        """The final norm, modulated by the timestep."""
        return self.model.norm_out  # type: ignore[return-value]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The one that all blocks share."""
        embed: Any = self.model.time_embed
        return [getattr(embed, "emb", embed).timestep_embedder]

    def model_timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return what the model is given for timesteps of the scheduler.

        Sana-Sprint is scheduled by an angle a, the noise's deviation being tan a, and given the
        flow-matching time sin a / (sin a + cos a) (Chen et al. 2025).
        """
        if self._radians:
            return timestep.sin() / (timestep.sin() + timestep.cos())
        return super().model_timestep(timestep)

    def scheduler_timestep(self, timestep: float) -> float:
        """Return the scheduler's timestep of one that the model is given."""
        if self._radians:
            return math.atan2(timestep, 1 - timestep)
        return super().scheduler_timestep(timestep)

    def narrows(self, call: dict[str, Any]) -> bool:
        """Whether no ControlNet adds residuals, which have a row for every sample, on the way."""
        return call.get("controlnet_block_samples") is None
