"""Networks of diffusers that are prompted by text, called as their own pipelines call them."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.backbones.conditioning import Captions, Rows, register_conditioning
from accelkit.errors import AccelkitError

_SCALED = frozenset({"scaling_factor"})
_SHIFTED = _SCALED | {"shift_factor"}
_NORMALISED = frozenset({"latents_mean", "latents_std"})


class _PixArt(Captions):
    returns = ("encoder_hidden_states", "encoder_attention_mask")
    latent_settings = _SCALED

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            height, width = self.size(latents)
            made = latents.new_tensor([[height, width]]), latents.new_tensor([[height / width]])
            size = {k: v.repeat(len(latents), 1) for k, v in zip(size, made, strict=True)}
        return {**super().arguments(latents, timestep, rows), "added_cond_kwargs": size}


class _Sana(Captions):
    """Captions follow the pipeline's own long instruction to the language model, "" does not."""

    latent_settings = _SCALED

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


class _UNet(Captions):
    """Stable Diffusion 1 and 2, and XL, which takes a pooled text and the image's size beside."""

    @property
    def latent_settings(self) -> frozenset[str]:  # type: ignore[override]
        """XL's pipelines normalise latents, where the autoencoder has their statistics."""
        return _SCALED | (_NORMALISED if self._sized else frozenset())

    def upcasts(self, pipe: Any) -> bool:
        """XL's pipelines do."""
        return self._sized

    @property
    def _sized(self) -> bool:
        return self.model.config.addition_embed_type == "text_time"

    def check(self) -> None:
        kind = self.model.config.addition_embed_type
        if kind not in {None, "text_time"}:
            raise AccelkitError(
                f"this {type(self.model).__name__} takes conditions of the kind {kind!r} beside "
                "text, which accelkit does not train or sample by itself"
            )
        _refuse_images(self.model)

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


class _SD3(Captions):
    returns = ("encoder_hidden_states", "", "pooled_projections")
    latent_settings = _SHIFTED

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        made = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return [(name, v) for name, v in zip(self.returns, made, strict=False) if name]

    def spacing(self, pipe: Any, steps: int) -> dict[str, Any]:
        _, height, width = self.shape
        patch = self.model.config.patch_size
        return _shift(pipe.scheduler.config, (height // patch) * (width // patch), most=1.16)


class _Flux(Captions):
    """Latents are packed into patches of 2x2; a distilled guidance scale is the pipeline's own."""

    returns = ("encoder_hidden_states", "pooled_projections")
    latent_settings = _SHIFTED
    guidance = 3.5

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of latents of 1024 pixels a side, the model's only hint being the channels."""
        return self.model.config.in_channels // 4, 128, 128

    @property
    def learns_variance(self) -> bool:
        """It does not."""
        return False

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        return list(zip(self.returns, pipe.encode_prompt(prompts, None), strict=False))

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        batch, channels, height, width = latents.shape
        patches = latents.unflatten(3, (width // 2, 2)).unflatten(2, (height // 2, 2))
        packed = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)
        ids = latents.new_zeros(height // 2, width // 2, 3)
        ids[..., 1] += torch.arange(height // 2).to(ids)[:, None]
        ids[..., 2] += torch.arange(width // 2).to(ids)
        call = super().arguments(packed, timestep, rows)
        call |= {"img_ids": ids.flatten(0, 1)}
        call |= {"txt_ids": ids.new_zeros(rows["encoder_hidden_states"].shape[1], 3)}
        if self.model.config.guidance_embeds:
            call |= {"guidance": latents.new_full((batch,), self.guidance)}
        return call

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        _, channels, height, width = latents.shape
        patches = output.view(len(output), height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)

    def spacing(self, pipe: Any, steps: int) -> dict[str, Any]:
        _, height, width = self.shape
        config = pipe.scheduler.config
        evenly = {"sigmas": np.linspace(1, 1 / steps, steps)}
        given = {} if config.get("use_flow_sigmas") else evenly
        return given | _shift(config, (height // 2) * (width // 2))


class _HunyuanDiT(Captions):
    """Two text encoders; image size, style and rotary positions as its pipeline gives them."""

    latent_settings = _SCALED

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
            # whose dtype the network takes for its own
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


class _Wan(Captions):
    """Images, as videos of one frame; of Wan 2.1's text-to-video models."""

    latent_settings = _NORMALISED

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of latents of 512 pixels a side, the model's only hint being the channels."""
        return self.model.config.in_channels, 64, 64

    def check(self) -> None:
        _refuse_images(self.model)

    def suits(self, pipe: Any) -> None:
        super().suits(pipe)
        if getattr(pipe, "transformer_2", None) is not None:
            raise AccelkitError(
                f"this {type(pipe).__name__} has two networks, one for high noise and one for low, "
                "which accelkit does not train or sample by itself"
            )
        if pipe.config.get("expand_timesteps"):
            raise AccelkitError(
                f"this {type(pipe).__name__} gives its network a timestep for every token, so that "
                "a sample has no one noise level to schedule"
            )

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        made = pipe.encode_prompt(prompts, None, False, max_sequence_length=512)
        return list(zip(self.returns, made, strict=False))

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        return super().arguments(latents.unsqueeze(2), timestep, rows)

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        return output.squeeze(2)


def _shift(config: Any, tokens: int, most: float = 1.15) -> dict[str, float]:
    """Return ``mu`` for images of so many tokens, if a scheduler's sigmas are shifted by it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    if not config.get("use_dynamic_shifting"):
        return {}
    lengths = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    shifts = config.get("base_shift", 0.5), config.get("max_shift", most)
    return {"mu": calculate_shift(tokens, *lengths, *shifts)}


def _refuse_images(model: Any) -> None:
    """Raise AccelkitError for a network that takes an image or a mask beside its sample."""
    takes, returns = model.config.in_channels, model.config.out_channels
    if takes > returns:
        raise AccelkitError(
            f"this {type(model).__name__} takes {takes} channels and returns {returns}, so that an "
            "image or a mask comes beside the sample, which accelkit does not train or sample by "
            "itself"
        )


register_conditioning("PixArtTransformer2DModel", _PixArt)
register_conditioning("SD3Transformer2DModel", _SD3)
register_conditioning("FluxTransformer2DModel", _Flux)
register_conditioning("SanaTransformer2DModel", _Sana)
register_conditioning("HunyuanDiT2DModel", _HunyuanDiT)
register_conditioning("UNet2DConditionModel", _UNet)
register_conditioning("WanTransformer3DModel", _Wan)
