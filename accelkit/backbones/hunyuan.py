"""HunyuanDiT in diffusers: ``HunyuanDiT2DModel`` (Li et al. 2024).

The blocks after the middle one are joined to those before it by long skips, as in U-ViT, and only
they are counted. A skipped block still joins its long skip, including a ControlNet's residual in
it: it runs the norm and the projection at its start and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import SCALED, Captions, Rows
from accelkit.backbones.registry import family
from accelkit.errors import AccelkitError


class _HunyuanCaptions(Captions):
    """Two text encoders; image size, style and rotary positions as the pipeline sets them."""

    latent_settings = SCALED

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        named = []
        for index, (suffix, length) in enumerate((("", 77), ("_t5", 256))):
            states, _, mask, _ = pipe.encode_prompt(
                prompts,
                dtype=self.model.dtype,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
                text_encoder_index=index,
            )
            named += [(f"encoder_hidden_states{suffix}", states)]
            named += [(f"text_embedding_mask{suffix}", mask)]
        return named

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import (
            get_resize_crop_region_for_grid,
        )

        patch = self.model.config.patch_size
        grid = tuple(side // patch for side in latents.shape[-2:])
        size = self.size(latents)
        return {
            # The network computes in the dtype of its timestep.
            **super().arguments(latents, timestep.to(latents.dtype), rows),
            "image_meta_size": latents.new_tensor([[*size, *size, 0, 0]]).repeat(len(latents), 1),
            "style": torch.zeros(len(latents), dtype=torch.long, device=latents.device),
            "image_rotary_emb": get_2d_rotary_pos_embed(
                self.model.inner_dim // self.model.num_heads,
                get_resize_crop_region_for_grid(grid, 64 // patch),
                grid,
                device=latents.device,
                output_type="pt",
            ),
        }


@family("HunyuanDiT2DModel", called=_HunyuanCaptions)
class HunyuanDiT(Backbone):
    """The decoder's blocks, which have a long skip (19 of 40 in version 1.2).

    The rotary positions are shared by all samples.
    """

    family = "hunyuan"
    all_blocks = "blocks"
    exit = "norm_out"
    time_embedders = ("time_extra_emb.timestep_embedder",)
    least = 0
    sequential = False
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "text_embedding_mask",
        "encoder_hidden_states_t5",
        "text_embedding_mask_t5",
        "image_meta_size",
        "style",
        "controlnet_block_samples",
    )
    block_batched = ("encoder_hidden_states", "temb", "skip")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not self.blocks:
            raise AccelkitError(
                f"a HunyuanDiT of {len(self.all_blocks)} blocks has none behind its middle one, so "
                "none can be skipped; it needs at least 4"
            )

    @property
    def blocks(self) -> list[Any]:
        """The blocks after the middle one."""
        every: Any = self.all_blocks
        return [block for block in every if block.skip_linear is not None]

    def skipped(self, index: int, call: dict[str, Any], depth: int | None) -> Tensor:
        """Return the tokens with the long skip joined."""
        block = self.blocks[index]
        joined = torch.cat([call["hidden_states"], call["skip"]], dim=-1)
        return block.skip_linear(block.skip_norm(joined))
