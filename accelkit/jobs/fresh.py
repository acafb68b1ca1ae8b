"""Untrained networks of the families that can be trained from scratch, each in its pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError
from accelkit.jobs.settings import ModelConfig
from accelkit.noise.axis import reference_process


def check_sizes(config: ModelConfig, vae: Any) -> None:
    """Check that a network can be built and trained; nothing is allocated.

    Raises:
        AccelkitError: the sizes do not fit each other, or the parameters do not fit the memory.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1) * config.patch_size
    if config.image_size % factor:
        raise AccelkitError(
            f"image_size {config.image_size} is not a multiple of {factor}, the autoencoder's "
            "factor times the patch size"
        )
    try:
        with torch.device("meta"):
            network = _PIPELINES[config.family](config, vae, {}).transformer
    except Exception as error:  # torch raises several kinds for sizes that overflow
        raise AccelkitError(
            f"no network of these sizes can be built ({error}); give smaller ones in [model]"
        ) from error
    count = sum(p.numel() for part in (network, vae) for p in part.parameters())
    # positions have a row for each token; the autoencoder's first layer sees every pixel
    held = sum(b.numel() for b in network.buffers())
    held += vae.config.block_out_channels[0] * config.image_size**2
    if (needed := _BYTES_TO_TRAIN * count + 4 * held) > (room := _memory()):
        raise AccelkitError(
            f"training {count:.3g} parameters on images of {config.image_size} pixels takes at "
            f"least {needed / 2**30:,.0f} GiB, this machine has {room / 2**30:,.0f}; give smaller "
            "sizes in [model] or [autoencoder]"
        )


_BYTES_TO_TRAIN = 5 * 4
"""Bytes for a float32 parameter: itself, its gradient, AdamW's two moments, the EMA teacher's."""


def _memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fresh_pipeline(config: ModelConfig, vae: Any, classes: Mapping[int, str], seed: int) -> Any:
    """Return a pipeline around an untrained network, drawn as the family's authors draw it."""
    pipe = _PIPELINES[config.family](config, vae, classes)
    backbone_of(pipe.transformer).initialize(seed)  # type: ignore[attr-defined]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(config: ModelConfig, vae: Any) -> dict[str, int]:
    """Return the sizes that networks of all families take."""
    return {
        "in_channels": vae.config.latent_channels,
        "sample_size": config.image_size // 2 ** (len(vae.config.block_out_channels) - 1),
        "patch_size": config.patch_size,
        "num_layers": config.layers,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
    }


def _dit(config: ModelConfig, vae: Any, classes: Mapping[int, str]) -> Any:
    from diffusers import DiTTransformer2DModel

    from accelkit.models import dit_pipeline_for

    latents = _latents(config, vae)
    network = DiTTransformer2DModel(
        **latents,
        out_channels=2 * latents["in_channels"],
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    names = dict(classes)
    kind = dit_pipeline_for(network, vae)
    pipe = kind(network, vae, reference_process(), id2label=names or None)
    pipe.register_to_config(id2label=names)  # diffusers reads it back but does not write it
    return pipe


def _uvit(config: ModelConfig, vae: Any, classes: Mapping[int, str]) -> Any:
    from accelkit.models import UViTPipeline, UViTTransformer2DModel

    network = UViTTransformer2DModel(
        **_latents(config, vae),
        num_classes=config.num_classes + 1,
        null_class=config.num_classes,
        timestep_offset=1.0,  # its discrete process counts steps from 1
    )
    return UViTPipeline(network, reference_process(), vae)


_PIPELINES: dict[str, Callable[[ModelConfig, Any, Mapping[int, str]], Any]] = {
    "dit": _dit,
    "uvit": _uvit,
}
