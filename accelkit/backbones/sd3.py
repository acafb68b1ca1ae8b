"""Stable Diffusion 3 and 3.5 in diffusers: ``SD3Transformer2DModel`` (Esser et al. 2024).

A skipped block returns text and image states as it got them; the final norm runs on the image
states of the last block kept. Only the model's last block drops the text states: an exit before it
runs the text half of its own last block for nothing, as the network that is cut there does.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from accelkit.backbones.base import Backbone


class SD3(Backbone):
    """All joint blocks, those with SD3.5's second, image-only attention among them.

    Blocks that a call leaves out by ``skip_layers`` (skip-layer guidance) keep their numbers: a
    depth counts them too.
    """

    family = "sd3"
    states = ("encoder_hidden_states", "hidden_states")
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs",
    )
    block_batched = ("temb", "joint_attention_kwargs")

    @property
    def blocks(self) -> nn.ModuleList:
        """All transformer blocks."""
        return self.model.transformer_blocks  # type: ignore[return-value]

    @property
    def exit(self) -> nn.Module:
        """The final norm, modulated by the timestep and the pooled text."""
        return self.model.norm_out  # type: ignore[return-value]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The one that all blocks share."""
        return [self.model.time_text_embed.timestep_embedder]  # type: ignore[union-attr, list-item]

    def narrows(self, call: dict[str, Any]) -> bool:
        """Whether no ControlNet adds residuals, which have a row for every sample, on the way."""
        return call.get("block_controlnet_hidden_states") is None
