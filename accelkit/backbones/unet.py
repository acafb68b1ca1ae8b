"""UNets in diffusers: ``UNet2DModel`` and ``UNet2DConditionModel``.

Down and up blocks change the resolution and hand one another long skips, so none of them can be
left out. What keeps the shape can: the transformer blocks inside attentions, bare attentions, which
add their input themselves, and the middle block as a whole. They are counted in the order in which
they run, so that those next to the output are dropped first. The convolutions always run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from accelkit.backbones.base import Backbone
from accelkit.errors import AccelkitError

_TEXT_TOKENS = 77  # CLIP's, for which these are made


class UNet(Backbone):
    """All of a UNet that keeps the shape: attention and the middle block.

    A ControlNet's residual for the middle block is added behind it, whether it runs or not. Samples
    of different depths are run in one pass for each depth.
    """

    family = "unet"
    least = 0
    sequential = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config: Any = model.config
        self.batched = _CONDITIONS if "cross_attention_dim" in config else _LABELS
        if not self.blocks:
            raise AccelkitError(
                f"this {type(model).__name__} has no attention and no middle block, and nothing "
                "else of a UNet can be skipped: its other blocks change the resolution"
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks and attentions of the way down, middle block, those of the way up."""
        model: Any = self.model
        down = [part for block in model.down_blocks for part in _keeping_shape(block)]
        middle = [] if model.mid_block is None else [model.mid_block]
        return down + middle + [part for block in model.up_blocks for part in _keeping_shape(block)]

    @property
    def num_classes(self) -> int | None:
        """How many labels there are; None without labels."""
        return self.model.config.get("num_class_embeds")  # type: ignore[union-attr, operator]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The one that all blocks share."""
        return [self.model.time_embedding]  # type: ignore[list-item]

    def example(self, batch: int = 1, device: torch.device | str = "meta") -> dict[str, Any]:
        """Return the arguments of a call of ``batch`` samples whose numbers nobody looks at."""
        model: Any = self.model
        config = model.config
        size = config.sample_size or 64

        def zeros(*shape: int, **like: Any) -> torch.Tensor:
            return torch.zeros(batch, *shape, **{"device": device, "dtype": model.dtype, **like})

        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        given = {"sample": zeros(config.in_channels, height, width), "timestep": zeros() + 1}
        if config.num_class_embeds is not None:
            given["class_labels"] = zeros(dtype=torch.long)
        if self.batched is _LABELS:
            return given
        text = config.encoder_hid_dim or config.cross_attention_dim
        text = text if isinstance(text, int) else text[0]
        given["encoder_hidden_states"] = zeros(_TEXT_TOKENS, text)
        if config.addition_embed_type == "text_time":  # SDXL: six numbers and a pooled text
            sizes = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - sizes
            added = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
            return {**given, "added_cond_kwargs": added}
        if config.addition_embed_type is not None:
            raise AccelkitError(
                f"what a {type(model).__name__} with additions of the kind "
                f"{config.addition_embed_type!r} is called with is not known to accelkit"
            )
        return given


_LABELS = ("sample", "class_labels")
_CONDITIONS = (
    "sample",
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "cross_attention_kwargs",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
)


def _keeping_shape(block: Any) -> list[nn.Module]:
    """Return what can be skipped of one down or up block, in the order in which it runs."""
    parts: list[nn.Module] = []
    for attention in getattr(block, "attentions", None) or []:
        transformers = [m for m in attention.modules() if hasattr(m, "transformer_blocks")]
        parts += [part for each in transformers for part in each.transformer_blocks]
        if not transformers:  # a bare attention, which adds its input itself
            parts.append(attention)
    return parts
