"""Train a small latent DiT from scratch: autoencoder, denoiser, a pipeline for diffusers."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from accelkit.backbones import DiT
from accelkit.data.sources import ImageSource, iter_images, open_source
from accelkit.errors import AccelkitError
from accelkit.jobs.common import Reporter, Run, Source, claimed, encoded, items_of, watch
from accelkit.loading import reading
from accelkit.schedule import Schedule
from accelkit.train.autoencoder import AutoencoderConfig, train_autoencoder
from accelkit.train.config import TrainConfig
from accelkit.train.dvd import parts_of
from accelkit.train.loop import train

PIPELINE, AUTOENCODER = "pipeline", "autoencoder"


@dataclass(frozen=True)
class ModelConfig:
    """The denoiser's architecture, a DiT with learned sigma on linear betas.

    Attributes:
        image_size: height and width in pixels.
        layers, heads, head_dim, patch_size: of the transformer.
        num_classes: rows of the label table without the null class, which comes last; diffusers'
            pipeline expects 1000.
    """

    image_size: int = 32
    layers: int = 28
    heads: int = 4
    head_dim: int = 16
    patch_size: int = 2
    num_classes: int = 1000


def scratch(
    source: Source,
    schedule: str,
    model: ModelConfig,
    autoencoder: AutoencoderConfig,
    config: TrainConfig,
    where: Run,
    reporter: Reporter,
) -> None:
    """Train and leave a half-precision ``DiTPipeline`` directory at ``OUTPUT/pipeline``.

    Raises:
        AccelkitError: any input that does not fit, or a loss that is not finite.
        accelkit.train.loop.Stopped: a signal ended it; it can be resumed.
    """
    images = open_source(source.data, skip_bad=source.skip_bad)
    if len(images.classes) > model.num_classes:
        raise AccelkitError(
            f"{source.data} has {len(images.classes)} classes, the model {model.num_classes}; "
            "raise num_classes"
        )
    factor = 2 ** (len(autoencoder.channels) - 1) * model.patch_size
    if model.image_size % factor:
        raise AccelkitError(
            f"image_size {model.image_size} is not a multiple of {factor}, the autoencoder's "
            "factor times the patch size"
        )
    parsed = Schedule.parse(schedule, model.layers)
    if config.intermediate_weight:
        parts_of(parsed)  # or it would fail when the autoencoder is trained
    settings = {
        "job": "train",
        "source": asdict(source),
        "schedule": parsed.to_dict(),
        "model": asdict(model),
        "autoencoder": {**asdict(autoencoder), "channels": list(autoencoder.channels)},
        "train": config.to_dict(),
    }
    with claimed(settings, config, where) as (run, accelerator):
        vae = _autoencoder(images, model, autoencoder, where, accelerator, reporter)
        pipe = _pipeline(images, model, vae, config.seed)
        latents = encoded(pipe, images, source.flip, accelerator, reporter)
        items = items_of(images, pipe.transformer)
        watching = watch(pipe, items, config, where, accelerator, reporter)
        train(pipe.transformer, pipe.scheduler, parsed, latents, config, run, accelerator, watching)
        if accelerator.is_main_process:
            part = where.output / (PIPELINE + ".partial")
            shutil.rmtree(part, ignore_errors=True)
            for network in (pipe.transformer, pipe.vae):
                nn.Module.to(network, torch.float16)  # diffusers' own to() warns of nothing
            pipe.save_pretrained(part)
            shutil.rmtree(where.output / PIPELINE, ignore_errors=True)
            part.rename(where.output / PIPELINE)


def _autoencoder(
    images: ImageSource,
    model: ModelConfig,
    config: AutoencoderConfig,
    where: Run,
    accelerator: Any,
    reporter: Reporter,
) -> Any:
    """Return the autoencoder, trained by the main process unless an earlier run has done so."""
    from diffusers import AutoencoderKL

    folder = where.output / AUTOENCODER
    if accelerator.is_main_process and not folder.exists():
        pixels = np.concatenate([b for _, b in iter_images(images, model.image_size, 256)])
        vae = train_autoencoder(
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            config,
            lambda step, loss: reporter.advance(
                "training the autoencoder", step, config.steps, f"loss {loss:.4f}"
            ),
        )
        part = folder.with_name(folder.name + ".partial")
        vae.save_pretrained(part)
        part.rename(folder)
    accelerator.wait_for_everyone()
    with reading(str(folder)):
        vae = AutoencoderKL.from_pretrained(folder).eval()
    vae.register_to_config(_name_or_path="")  # else it is published where this run lay
    return vae


def _pipeline(images: ImageSource, model: ModelConfig, vae: Any, seed: int) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    channels = vae.config.latent_channels
    network = DiTTransformer2DModel(
        num_attention_heads=model.heads,
        attention_head_dim=model.head_dim,
        in_channels=channels,
        out_channels=2 * channels,
        num_layers=model.layers,
        sample_size=model.image_size // factor,
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes,
        norm_eps=1e-6,
    )
    DiT(network).initialize(seed)
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    names = dict(enumerate(images.classes))
    pipe = DiTPipeline(network, vae, scheduler, id2label=names or None)
    pipe.register_to_config(id2label=names)  # which diffusers reads back but does not write
    pipe.set_progress_bar_config(disable=True)
    return pipe
