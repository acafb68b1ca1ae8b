"""FLUX in diffusers: ``FluxTransformer2DModel`` (Black Forest Labs 2024).

Two lists of blocks make one depth: first the double blocks, which keep text and image apart, then
the single ones, which run on both joined. Either kind takes and returns the two separately, so that
a skipped block passes them on and the final norm runs on the image states of the last block kept.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from accelkit.backbones.base import Backbone


class Flux(Backbone):
    """The double blocks and, counted on from them, the single ones (19 and 38 in FLUX.1).

    The position ids are shared by all samples; the guidance scale is not. The model is given a
    thousandth of the scheduler's timestep.
    """

    family = "flux"
    layout = "BNC"
    states = ("encoder_hidden_states", "hidden_states")
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    )
    block_batched = ("temb", "joint_attention_kwargs")
    timestep_scale = 1e-3

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of both lists, in the order in which they run."""
        model: Any = self.model
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    @property
    def exit(self) -> nn.Module:
        """The final norm, modulated by timestep, guidance and pooled text."""
        return self.model.norm_out  # type: ignore[return-value]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The one that all blocks share."""
        return [self.model.time_text_embed.timestep_embedder]  # type: ignore[union-attr, list-item]

    def narrows(self, call: dict[str, Any]) -> bool:
        """Whether no ControlNet adds residuals, which have a row for every sample, on the way."""
        residuals = ("controlnet_block_samples", "controlnet_single_block_samples")
        return all(call.get(name) is None for name in residuals)
