"""HunyuanDiT in diffusers: ``HunyuanDiT2DModel`` (Li et al. 2024).

The blocks behind the middle one are joined to those before it by long skips, as in U-ViT, and are
the only ones counted. A skipped one still joins its long skip, a ControlNet's residual in it: it
runs the norm and the projection that it begins with, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.base import Backbone
from accelkit.errors import AccelkitError


class HunyuanDiT(Backbone):
    """The decoder's blocks, those with a long skip (19 of 40 in version 1.2).

    The rotary positions are shared by all samples.
    """

    family = "hunyuan"
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
                "that none can be skipped; it needs at least 4"
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks behind the middle one."""
        return [b for b in self.all_blocks if b.skip_linear is not None]

    @property
    def all_blocks(self) -> nn.ModuleList:
        """Encoder, middle block and decoder."""
        return self.model.blocks  # type: ignore[return-value]

    @property
    def exit(self) -> nn.Module:
        """The final norm, modulated by timestep, text and size."""
        return self.model.norm_out  # type: ignore[return-value]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The one that all blocks share."""
        return [self.model.time_extra_emb.timestep_embedder]  # type: ignore[union-attr, list-item]

    def skipped(self, index: int, call: dict[str, Any], depth: int | None) -> Tensor:
        """Return the tokens with the long skip joined."""
        block: Any = self.blocks[index]
        joined = torch.cat([call["hidden_states"], call["skip"]], dim=-1)
        return block.skip_linear(block.skip_norm(joined))
