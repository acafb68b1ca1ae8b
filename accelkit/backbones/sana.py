"""Sana in diffusers: ``SanaTransformer2DModel`` (Xie et al. 2024).

A skipped block runs nothing; the final modulated norm runs on the hidden states of the last block
kept. Self-attention is linear in the number of tokens, so merging some would save next to nothing.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import SCALED, Captions
from accelkit.backbones.registry import family


class _SanaCaptions(Captions):
    """Captions follow the pipeline's long instruction to the language model, "" does not."""

    latent_settings = SCALED

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        takes = inspect.signature(type(pipe).__call__).parameters
        states, mask, null, null_mask = pipe.encode_prompt(
            prompts, complex_human_instruction=takes["complex_human_instruction"].default
        )
        empty = torch.tensor([not prompt for prompt in prompts], device=states.device)
        return [
            ("encoder_hidden_states", torch.where(empty[:, None, None], null, states)),
            ("encoder_attention_mask", torch.where(empty[:, None], null_mask, mask)),
        ]


@family("SanaTransformer2DModel", called=_SanaCaptions)
class Sana(Backbone):
    """All blocks: linear self-attention, cross-attention to the caption, convolutional MLP.

    The argument ``timestep`` of a block holds the six modulation vectors made from the timestep.
    """

    family = "sana"
    blocks = "transformer_blocks"
    exit = "norm_out"
    residuals = ("controlnet_block_samples",)
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "guidance",
        "encoder_attention_mask",
        "attention_mask",
        *residuals,
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
        self._radians = config.guidance_embeds  # true for Sana-Sprint, a consistency model

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The one that all blocks share."""
        embed: Any = self.model.time_embed
        return [getattr(embed, "emb", embed).timestep_embedder]

    def model_timestep(self, timestep: Tensor) -> Tensor:
        """Return the timesteps that the model is given for timesteps of the scheduler.

        Sana-Sprint's scheduler counts in angles a, where the noise's deviation is tan a; the model
        is given the flow-matching time sin a / (sin a + cos a) (Chen et al. 2025).
        """
        if self._radians:
            return timestep.sin() / (timestep.sin() + timestep.cos())
        return super().model_timestep(timestep)

    def scheduler_timestep(self, timestep: float) -> float:
        """Return the scheduler's timestep for one that the model is given."""
        if self._radians:
            return math.atan2(timestep, 1 - timestep)
        return super().scheduler_timestep(timestep)
