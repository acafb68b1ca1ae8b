"""Train a small latent model from scratch: autoencoder, denoiser, a pipeline for diffusers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from accelkit.artifact.loading import FETCH_AGAIN, open_whole, reading
from accelkit.data.shards import fingerprint_of
from accelkit.data.sources import ImageSource, iter_images
from accelkit.files.tensors import check_tensors
from accelkit.files.weights import check_model
from accelkit.jobs.common import (
    Reporter,
    Run,
    Source,
    announce,
    claimed,
    encoded,
    identify,
    items_of,
    open_data,
    save_pipeline,
    watch,
)
from accelkit.jobs.fresh import ModelConfig, check_sizes, fresh_pipeline
from accelkit.schedule import Schedule
from accelkit.train.autoencoder import AutoencoderConfig, build_autoencoder, train_autoencoder
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
    given = None if source.vae is None else _open(source.vae, FETCH_AGAIN)
    parsed = checked_schedule(schedule, model, given or autoencoder, config)
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
        identify(run, accelerator, images, autoencoder=fingerprint_of(vae))
        pipe = fresh_pipeline(model, vae, images.names, config.seed)
        latents = encoded(pipe, images, source.flip, accelerator, reporter)
        announce(images, where, accelerator, reporter)
        items = items_of(images, pipe.transformer)
        watching = watch(pipe, items, config, where, accelerator, reporter)
        train(pipe.transformer, pipe.scheduler, parsed, latents, config, run, accelerator, watching)
        if accelerator.is_main_process:
            for network in (pipe.transformer, pipe.vae):
                nn.Module.to(network, torch.float16)  # diffusers' own to() warns of nothing
            save_pipeline(pipe, where.output / PIPELINE)


def checked_schedule(
    schedule: str, model: ModelConfig, autoencoder: AutoencoderConfig | Any, config: TrainConfig
) -> Schedule:
    """Return the schedule, if the settings of a training go together; nothing is allocated.

    Args:
        schedule: as :meth:`accelkit.schedule.Schedule.parse` takes it.
        model: the network's architecture.
        autoencoder: how it is to be trained, or one that is.
        config: how the network is to be trained.

    Raises:
        AccelkitError: they do not.
    """
    parsed = Schedule.parse(schedule, model.depth, model.family)
    if config.intermediate_weight:
        parts_of(parsed)  # or it would fail when the autoencoder is trained
    if isinstance(autoencoder, AutoencoderConfig):
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            autoencoder = build_autoencoder(autoencoder, model.image_size)
    check_sizes(model, autoencoder)
    return parsed


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
        save_pipeline(vae, folder)
    accelerator.wait_for_everyone()
    return _open(str(folder), "start over with --overwrite")


def _open(place: str, what_to_do: str) -> Any:
    """Return the autoencoder of a directory or hub id.

    Args:
        place: the directory or hub id.
        what_to_do: about a damaged file, as the end of a sentence.
    """
    from diffusers import AutoencoderKL

    with reading(place):
        check_tensors(Path(place), what_to_do)
        vae = open_whole(AutoencoderKL, place)
    check_model(vae, place, Path(place))
    vae.register_to_config(_name_or_path="")  # else it is published where this run lay
    return vae
