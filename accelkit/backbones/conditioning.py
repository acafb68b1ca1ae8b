"""How a family's network is called on noisy latents, and what tells its samples apart.

What a sample is conditioned on is an item: a class, a caption, or None for neither. ``encode``
turns items into rows, tensors by name with one row per item, which can be kept, mixed and cut;
``arguments`` makes a model's call of latents and rows. A family whose call needs no more than class
labels, or nothing, has nothing to register.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accelkit.backbones.base import Backbone
from accelkit.errors import AccelkitError

Item = int | str | None
Rows = dict[str, Tensor]


class Conditioning:
    """Classes, for families that have them; nothing for those that don't.

    Attributes:
        backbone: the network's family.
        text: whether items are captions.
    """

    text = False

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.model: Any = backbone.model
        self._takes = list(inspect.signature(type(self.model).forward).parameters.values())[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample of latents, (C, h, w)."""
        config = self.model.config
        size = config.sample_size
        return config.in_channels, *(size if isinstance(size, (list, tuple)) else (size, size))

    def pixels(self, pipe: Any) -> int:
        """Return height and width in pixels of what ``pipe`` makes by itself."""
        vae = getattr(pipe, "vae", None)
        if vae is None:
            return self.shape[-1]
        if "scale_factor_spatial" in vae.config:  # of a video's
            return self.shape[-1] * vae.config["scale_factor_spatial"]
        levels = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
        return self.shape[-1] * 2 ** (len(levels) - 1)

    @property
    def learns_variance(self) -> bool:
        """Whether the network returns a variance beside its prediction."""
        config = self.model.config
        # HunyuanDiT's config does not say
        known = config.get("out_channels") or vars(self.model).get("out_channels")
        return known == 2 * config.in_channels

    def check(self) -> None:
        """Raise AccelkitError for a network whose call needs what is not known here."""
        given = {"timestep", "class_labels"}
        needed = [p.name for p in self._takes[1:] if _required(p) and p.name not in given]
        if needed:
            raise AccelkitError(
                f"accelkit cannot call a {type(self.model).__name__} by itself, to train or sample "
                f"it: what {needed[0]} is to hold is not known; register it with "
                "accelkit.backbones.conditioning.register_conditioning"
            )

    def suits(self, pipe: Any) -> None:
        """Raise AccelkitError for a pipeline that calls its network in another way than here."""

    def encode(self, pipe: Any, items: Sequence[Item]) -> Rows:
        """Return the rows of ``items``, on the CPU.

        Raises:
            AccelkitError: a class that the model lacks.
        """
        count, null = self.backbone.num_classes, self.backbone.null_class
        if count is None:
            return {}
        labels = [null if item is None else item for item in items]
        if None in labels:
            raise AccelkitError(
                f"this {type(self.model).__name__} was never trained without labels; give a class "
                "for each image and no guidance"
            )
        last = count - 1 if null is None else null
        if outside := [n for n in labels if not isinstance(n, int) or not 0 <= n <= last]:
            raise AccelkitError(f"the model has classes 0 to {count - 1}, got {outside[0]}")
        return {"class_labels": torch.tensor(labels)}

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        """Return the arguments of a model's call.

        Args:
            latents: (B, C, h, w), with noise.
            timestep: (B,), the scheduler's.
            rows: B of them.
        """
        device = latents.device
        return {
            self._takes[0].name: latents,
            "timestep": self.backbone.model_timestep(timestep),
            **{k: v.to(latents if v.is_floating_point() else device) for k, v in rows.items()},
        }

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """Return what the model returned in the layout of ``latents`` (B, C or 2C, h, w)."""
        return output


def _required(parameter: inspect.Parameter) -> bool:
    # text has a default in many a signature, but no model that takes it runs without
    return parameter.name == "encoder_hidden_states" or (
        parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )


class Captions(Conditioning):
    """Text, embedded by the pipeline's own ``encode_prompt``, whose results are named here.

    Attributes:
        returns: the model's arguments for what ``encode_prompt`` returns, "" for what is left out.
    """

    text = True
    returns: tuple[str, ...] = ("encoder_hidden_states",)

    def check(self) -> None:
        """All that a call needs is known."""

    def encode(self, pipe: Any, items: Sequence[Item]) -> Rows:
        """Return the embeddings of captions, None being the empty one.

        Raises:
            AccelkitError: an item is a class.
        """
        prompts = ["" if item is None else item for item in items]
        if strange := [p for p in prompts if not isinstance(p, str)]:
            raise AccelkitError(
                f"a {type(self.model).__name__} is prompted by text, got class {strange[0]}"
            )
        with torch.no_grad():
            return {name: value.detach().cpu() for name, value in self._embed(pipe, prompts)}

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        made = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return [(name, v) for name, v in zip(self.returns, made, strict=False) if name]


class _PixArt(Captions):
    returns = ("encoder_hidden_states", "encoder_attention_mask")

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            height, width = (8 * side for side in latents.shape[-2:])
            made = latents.new_tensor([[height, width]]), latents.new_tensor([[height / width]])
            size = {k: v.repeat(len(latents), 1) for k, v in zip(size, made, strict=True)}
        return {**super().arguments(latents, timestep, rows), "added_cond_kwargs": size}


class _Sana(Captions):
    """Captions follow the pipeline's own long instruction to the language model, "" does not."""

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
    """Stable Diffusion 1 and 2; the pooled text and image sizes of SDXL are not known here."""

    def check(self) -> None:
        if self.model.config.addition_embed_type is not None:
            raise AccelkitError(
                f"this {type(self.model).__name__} takes conditions of the kind "
                f"{self.model.config.addition_embed_type!r} beside text, which accelkit does not "
                "train or sample by itself"
            )
        _refuse_images(self.model)

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        made = pipe.encode_prompt(prompts, pipe._execution_device, 1, False)
        return list(zip(self.returns, made, strict=False))


class _SD3(Captions):
    returns = ("encoder_hidden_states", "", "pooled_projections")

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        made = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return [(name, v) for name, v in zip(self.returns, made, strict=False) if name]


class _Flux(Captions):
    """Latents are packed into patches of 2x2; a distilled guidance scale is the pipeline's own."""

    returns = ("encoder_hidden_states", "pooled_projections")
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


class _HunyuanDiT(Captions):
    """Two text encoders; image size, style and rotary positions as its pipeline gives them."""

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
        size = [8 * side for side in latents.shape[-2:]]
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of latents of 512 pixels a side, the model's only hint being the channels."""
        return self.model.config.in_channels, 64, 64

    def check(self) -> None:
        _refuse_images(self.model)

    def suits(self, pipe: Any) -> None:
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


def _refuse_images(model: Any) -> None:
    """Raise AccelkitError for a network that takes an image or a mask beside its sample."""
    takes, returns = model.config.in_channels, model.config.out_channels
    if takes > returns:
        raise AccelkitError(
            f"this {type(model).__name__} takes {takes} channels and returns {returns}, so that an "
            "image or a mask comes beside the sample, which accelkit does not train or sample by "
            "itself"
        )


_known: dict[str, type[Conditioning]] = {}


def register_conditioning(model: str | type, conditioning: type[Conditioning]) -> None:
    """Let models of a class, given it or its name, be called as ``conditioning`` says."""
    _known[model if isinstance(model, str) else model.__name__] = conditioning


def conditioning_of(backbone: Backbone) -> Conditioning:
    """Return how the network of ``backbone`` is called.

    Raises:
        AccelkitError: its call needs more than class labels, and what is not known.
    """
    kinds = (_known.get(kind.__name__) for kind in type(backbone.model).__mro__)
    conditioning = next((kind for kind in kinds if kind), Conditioning)(backbone)
    conditioning.check()
    return conditioning


register_conditioning("PixArtTransformer2DModel", _PixArt)
register_conditioning("SD3Transformer2DModel", _SD3)
register_conditioning("FluxTransformer2DModel", _Flux)
register_conditioning("SanaTransformer2DModel", _Sana)
register_conditioning("HunyuanDiT2DModel", _HunyuanDiT)
register_conditioning("UNet2DConditionModel", _UNet)
register_conditioning("WanTransformer3DModel", _Wan)
