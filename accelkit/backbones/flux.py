"""FLUX in diffusers: ``FluxTransformer2DModel`` (Black Forest Labs 2024).

Two lists of blocks form one depth: first the double blocks, which keep text and image apart, then
the single blocks, which run on both joined. Both kinds take and return the two separately, so a
skipped block passes them on and the final norm runs on the image states of the last block kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import SHIFTED, Captions, Rows, shift_of
from accelkit.backbones.registry import family


class _FluxCaptions(Captions):
    """Latents are packed into patches of 2x2; a distilled guidance scale is the pipeline's own."""

    returns = ("encoder_hidden_states", "pooled_projections")
    embedding = {"prompt_2": None}  # noqa: RUF012
    latent_settings = SHIFTED
    guidance = 3.5

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents of 1024 x 1024 pixels; the config has the channels alone."""
        return self.model.config.in_channels // 4, 128, 128

    @property
    def learns_variance(self) -> bool:
        """Always False: the network's channels are those of packed latents."""
        return False

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        batch, channels, height, width = latents.shape
        patches = latents.unflatten(3, (width // 2, 2)).unflatten(2, (height // 2, 2))
        packed = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)
        ids = latents.new_zeros(height // 2, width // 2, 3)
        ids[..., 1] += torch.arange(height // 2).to(ids)[:, None]
        ids[..., 2] += torch.arange(width // 2).to(ids)
        call = super().arguments(packed, timestep, rows)
        call["img_ids"] = ids.flatten(0, 1)
        call["txt_ids"] = ids.new_zeros(rows["encoder_hidden_states"].shape[1], 3)
        if self.model.config.guidance_embeds:
            call["guidance"] = latents.new_full((batch,), self.guidance)
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
        return given | shift_of(config, (height // 2) * (width // 2))


@family("FluxTransformer2DModel", called=_FluxCaptions)
class Flux(Backbone):
    """The double blocks, then the single blocks (19 and 38 in FLUX.1).

    The position ids are shared by all samples, the guidance scale is not.
    """

    family = "flux"
    blocks = ("transformer_blocks", "single_transformer_blocks")
    exit = "norm_out"
    time_embedders = ("time_text_embed.timestep_embedder",)
    layout = "BNC"
    timestep_scale = 1e-3
    states = ("encoder_hidden_states", "hidden_states")
    residuals = ("controlnet_block_samples", "controlnet_single_block_samples")
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "guidance",
        "joint_attention_kwargs",
        *residuals,
    )
    block_batched = ("temb", "joint_attention_kwargs")
