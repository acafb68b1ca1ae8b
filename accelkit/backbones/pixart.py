"""PixArt-alpha and PixArt-Sigma in diffusers: ``PixArtTransformer2DModel`` (Chen et al. 2023).

A skipped block runs nothing; the final norm, whose modulation the model computes once from the
timestep, runs on the hidden states of the last block kept. What a block gets as ``timestep`` is
no timestep but the six modulation vectors of adaLN-single.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from accelkit.backbones.base import Backbone
from accelkit.errors import AccelkitError


class PixArt(Backbone):
    """All blocks of a PixArt: self-attention, cross-attention to the caption, feed-forward."""

    family = "pixart"
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "added_cond_kwargs",
        "attention_mask",
        "encoder_attention_mask",
    )
    block_batched = (
        "attention_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "timestep",
    )

    @property
    def blocks(self) -> nn.ModuleList:
        """All transformer blocks."""
        return self.model.transformer_blocks  # type: ignore[return-value]

    @property
    def exit(self) -> nn.Module:
        """The final layer norm."""
        return self.model.norm_out  # type: ignore[return-value]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The one that all blocks share."""
        return [self.model.adaln_single.emb.timestep_embedder]  # type: ignore[union-attr, list-item]

    def attentions(self) -> list[list[nn.Module]]:
        """Return each block's self-attention over the patches; positions are added before it."""
        return [[block.attn1] for block in self.blocks]  # type: ignore[list-item]

    def grid(self, call: dict[str, Any]) -> tuple[int, int]:
        """Return height and width in patches; AccelkitError if some of them are masked."""
        if call.get("attention_mask") is not None:
            raise AccelkitError(
                "a merged token stands for several patches, of which an attention_mask may hide "
                "some; call this PixArt without one, or with a schedule that merges no tokens"
            )
        return super().grid(call)
