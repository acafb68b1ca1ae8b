"""Train a small latent model from scratch: autoencoder, denoiser, a pipeline for diffusers."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from accelkit.data.sources import ImageSource, iter_images
from accelkit.errors import AccelkitError
from accelkit.jobs.common import (
    Reporter,
    Run,
    Source,
    announce,
    claimed,
    encoded,
    items_of,
    open_data,
    watch,
)
from accelkit.jobs.fresh import ModelConfig, fresh_pipeline
from accelkit.loading import reading
from accelkit.schedule import Schedule
from accelkit.train.autoencoder import AutoencoderConfig, train_autoencoder
from accelkit.train.config import TrainConfig
from accelkit.train.dvd import parts_of
from accelkit.train.loop import train

PIPELINE, AUTOENCODER = "pipeline", "autoencoder"


def scratch(
    source: Source,
    schedule: str,
    model: ModelConfig,
    autoencoder: AutoencoderConfig,
    config: TrainConfig,
    where: Run,
    reporter: Reporter,
) -> None:
    """Train and leave a half-precision pipeline directory at ``OUTPUT/pipeline``.

    The autoencoder is trained first, unless ``source`` names one.

    Raises:
        AccelkitError: any input that does not fit, or a loss that is not finite.
        accelkit.errors.Stopped: a signal ended it; it can be resumed.
    """
    images = open_data(source, model.num_classes, "raise num_classes")
    given = None if source.vae is None else _open(source.vae)
    channels = autoencoder.channels if given is None else given.config.block_out_channels
    factor = 2 ** (len(channels) - 1) * model.patch_size
    if model.image_size % factor:
        raise AccelkitError(
            f"image_size {model.image_size} is not a multiple of {factor}, the autoencoder's "
            "factor times the patch size"
        )
    parsed = Schedule.parse(schedule, model.depth, model.family)
    if config.intermediate_weight:
        parts_of(parsed)  # or it would fail when the autoencoder is trained
    settings = {
        "job": "train",
        "source": asdict(source),
        "schedule": parsed.to_dict(),
        "model": asdict(model),
        "autoencoder": None
        if given
        else {**asdict(autoencoder), "channels": list(autoencoder.channels)},
        "train": config.to_dict(),
    }
    with claimed(settings, config, where) as (run, accelerator):
        vae = given or _autoencoder(images, model, autoencoder, where, accelerator, reporter)
        pipe = fresh_pipeline(model, vae, images.names, config.seed)
        latents = encoded(pipe, images, source.flip, accelerator, reporter)
        announce(images, where, accelerator, reporter)
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
    return _open(str(folder))


def _open(place: str) -> Any:
    """Return the autoencoder of a directory or hub id."""
    from diffusers import AutoencoderKL

    with reading(place):
        vae = AutoencoderKL.from_pretrained(place).eval()
    vae.register_to_config(_name_or_path="")  # else it is published where this run lay
    return vae
