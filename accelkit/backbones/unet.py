"""UNets in diffusers: ``UNet2DModel`` and ``UNet2DConditionModel``.

Down and up blocks change the resolution and are joined by long skips, so none of them can be left
out. Parts that keep the shape can: the transformer blocks inside attentions, bare attentions, which
add their input themselves, and the middle block as a whole. They are counted in the order in which
they run, so those next to the output are dropped first. The convolutions always run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import (
    NORMALISED,
    SCALED,
    Captions,
    Rows,
    Scaled,
    refuse_images,
)
from accelkit.backbones.registry import family
from accelkit.errors import AccelkitError

_TEXT_TOKENS = 77  # of CLIP, which these networks are made for


class _UNetCaptions(Captions):
    """Stable Diffusion 1 and 2, and XL, which also takes a pooled text and the image's size."""

    @property
    def latent_settings(self) -> frozenset[str]:  # type: ignore[override]
        """XL's pipelines normalise latents if the autoencoder has their statistics."""
        return SCALED | (NORMALISED if self._sized else frozenset())

    def upcasts(self, pipe: Any) -> bool:
        """Whether it is XL, whose pipelines do."""
        return self._sized

    @property
    def _sized(self) -> bool:
        return self.model.config.addition_embed_type == "text_time"

    def check(self) -> None:
        kind = self.model.config.addition_embed_type
        if kind not in {None, "text_time"}:
            raise AccelkitError(
                f"this {type(self.model).__name__} takes conditions of the kind {kind!r} next to "
                "text, which accelkit does not train or sample by itself"
            )
        refuse_images(self.model)

    def suits(self, pipe: Any) -> None:
        super().suits(pipe)
        if pipe.config.get("requires_aesthetics_score"):
            raise AccelkitError(
                f"this {type(pipe).__name__} refines images and gives its network an aesthetic "
                "score, which accelkit does not train or sample by itself"
            )

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        if self.model.config.addition_embed_type is None:
            return [("encoder_hidden_states", pipe.encode_prompt(prompts, None, 1, False)[0])]
        states, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        if pipe.config.force_zeros_for_empty_prompt:
            said = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
            states, pooled = states * said[:, None, None], pooled * said[:, None]
        return [("encoder_hidden_states", states), ("text_embeds", pooled)]

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        call = super().arguments(latents, timestep, rows)
        if self._sized:
            size = self.size(latents)
            times = latents.new_tensor([[*size, 0, 0, *size]]).repeat(len(latents), 1)
            call["added_cond_kwargs"] = {"text_embeds": call.pop("text_embeds"), "time_ids": times}
        return call


@family("UNet2DConditionModel", called=_UNetCaptions)
@family("UNet2DModel", called=Scaled)
class UNet(Backbone):
    """Everything in a UNet that keeps the shape: attention and the middle block.

    A ControlNet's residual for the middle block is added after it, whether it runs or not. Samples
    of different depths are run in one pass per depth.
    """

    family = "unet"
    time_embedders = ("time_embedding",)
    least = 0
    sequential = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config: Any = model.config
        self.batched = _CONDITIONS if "cross_attention_dim" in config else _LABELS
        if not self.blocks:
            raise AccelkitError(
                f"this {type(model).__name__} has no attention and no middle block, and nothing "
                "else in a UNet can be skipped: its other blocks change the resolution"
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts that keep the shape on the way down, the middle block, those on the way up."""
        model: Any = self.model
        down = [part for block in model.down_blocks for part in _keeping_shape(block)]
        middle = [] if model.mid_block is None else [model.mid_block]
        return down + middle + [part for block in model.up_blocks for part in _keeping_shape(block)]

    @property
    def num_classes(self) -> int | None:
        """The number of labels; None without labels."""
        return self.model.config.get("num_class_embeds")  # type: ignore[union-attr, operator]

    def example(self, batch: int = 1, device: torch.device | str = "meta") -> dict[str, Any]:
        """Return arguments for a call of ``batch`` samples whose values do not matter."""
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
        if config.addition_embed_type == "text_time":  # SDXL takes six numbers and a pooled text
            sizes = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - sizes
            added = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
            return {**given, "added_cond_kwargs": added}
        if config.addition_embed_type is not None:
            raise AccelkitError(
                f"accelkit does not know how to call a {type(model).__name__} with additions of "
                f"the kind {config.addition_embed_type!r}"
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
    """Return the parts of a down or up block that can be skipped, in the order they run."""
    parts: list[nn.Module] = []
    for attention in getattr(block, "attentions", None) or []:
        transformers = [m for m in attention.modules() if hasattr(m, "transformer_blocks")]
        parts += [part for each in transformers for part in each.transformer_blocks]
        if not transformers:  # A bare attention adds its input itself.
            parts.append(attention)
    return parts
