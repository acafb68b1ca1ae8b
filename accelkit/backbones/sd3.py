"""Stable Diffusion 3 and 3.5 in diffusers: ``SD3Transformer2DModel`` (Esser et al. 2024).

A skipped block returns text and image states unchanged; the final norm runs on the image states of
the last block kept. Only the model's last block drops the text states: an exit before it runs the
text half of its own last block for nothing, as the network cut there does.
"""

from __future__ import annotations

from typing import Any

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import SHIFTED, Captions, shift_of
from accelkit.backbones.registry import family


class _SD3Captions(Captions):
    """The joined states of three text encoders, and the pooled states of two."""

    returns = ("encoder_hidden_states", "", "pooled_projections")
    embedding = Captions.embedding | {"prompt_2": None, "prompt_3": None}
    latent_settings = SHIFTED

    def spacing(self, pipe: Any, steps: int) -> dict[str, Any]:
        _, height, width = self.shape
        patch = self.model.config.patch_size
        return shift_of(pipe.scheduler.config, (height // patch) * (width // patch), most=1.16)


@family("SD3Transformer2DModel", called=_SD3Captions)
class SD3(Backbone):
    """All joint blocks, including those with SD3.5's second, image-only attention.

    Blocks that a call leaves out by ``skip_layers`` (skip-layer guidance) keep their numbers and
    count towards a depth.
    """

    family = "sd3"
    blocks = "transformer_blocks"
    exit = "norm_out"
    time_embedders = ("time_text_embed.timestep_embedder",)
    states = ("encoder_hidden_states", "hidden_states")
    residuals = ("block_controlnet_hidden_states",)
    batched = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        *residuals,
        "joint_attention_kwargs",
    )
    block_batched = ("temb", "joint_attention_kwargs")
