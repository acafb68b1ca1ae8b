"""PixArt-alpha and PixArt-Sigma in diffusers: ``PixArtTransformer2DModel`` (Chen et al. 2023).

A skipped block runs nothing. The final norm, whose modulation the model computes once from the
timestep, runs on the hidden states of the last block kept. The argument ``timestep`` of a block
holds the six modulation vectors of adaLN-single.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import SCALED, Captions, Rows
from accelkit.backbones.registry import family
from accelkit.errors import AccelkitError


class _PixArtCaptions(Captions):
    """Captions, and the image's size for the networks that take it."""

    returns = ("encoder_hidden_states", "encoder_attention_mask")
    latent_settings = SCALED

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            height, width = self.size(latents)
            made = latents.new_tensor([[height, width]]), latents.new_tensor([[height / width]])
            size = {k: v.repeat(len(latents), 1) for k, v in zip(size, made, strict=True)}
        return {**super().arguments(latents, timestep, rows), "added_cond_kwargs": size}


@family("PixArtTransformer2DModel", called=_PixArtCaptions)
class PixArt(Backbone):
    """All blocks: self-attention, cross-attention to the caption, feed-forward."""

    family = "pixart"
    blocks = "transformer_blocks"
    exit = "norm_out"
    time_embedders = ("adaln_single.emb.timestep_embedder",)
    self_attention = "attn1"  # positions are added before it
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

    def grid(self, call: dict[str, Any]) -> tuple[int, int]:
        """Return height and width in patches; raise AccelkitError if some of them are masked."""
        if call.get("attention_mask") is not None:
            raise AccelkitError(
                "a merged token stands for several patches, of which an attention_mask may hide "
                "some; call this PixArt without one, or with a schedule that merges no tokens"
            )
        return super().grid(call)
