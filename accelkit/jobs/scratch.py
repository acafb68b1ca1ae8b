"""Trains a small latent model from scratch: its autoencoder, then its denoiser."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from accelkit.artifact.loading import open_whole
from accelkit.artifact.names import FETCH_AGAIN, reading
from accelkit.data.shards import fingerprint_of
from accelkit.data.sources import ImageSource, iter_images
from accelkit.files.tensors import check_tensors
from accelkit.files.weights import check_model
from accelkit.jobs.fresh import ModelConfig, check_sizes, fresh_pipeline
from accelkit.jobs.inputs import encoded, items_of, open_data
from accelkit.jobs.outputs import save_pipeline
from accelkit.jobs.reporter import Reporter
from accelkit.jobs.settings import Run, Source
from accelkit.jobs.training import announce, claimed, identify, watch
from accelkit.schedule import Schedule
from accelkit.subject import Subject
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
    """Train a model and write it to ``OUTPUT/pipeline``, in half precision, for diffusers.

    The autoencoder is trained first, unless ``source`` names one.

    Raises:
        AccelkitError: an input does not fit, or a loss is not finite.
        accelkit.errors.Stopped: a signal ended the run, which can be resumed.
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
        subject = Subject.of(pipe)
        latents = encoded(subject, images, source.flip, accelerator, reporter)
        announce(images, where, accelerator, reporter)
        items = items_of(images, subject)
        watching = watch(subject, items, config, where, accelerator, reporter)
        train(subject, parsed, latents, config, run, accelerator, watching)
        if accelerator.is_main_process:
            for network in (pipe.transformer, pipe.vae):
                nn.Module.to(network, torch.float16)  # diffusers' own to() warns needlessly
            save_pipeline(pipe, where.output / PIPELINE)


def checked_schedule(
    schedule: str, model: ModelConfig, autoencoder: AutoencoderConfig | Any, config: TrainConfig
) -> Schedule:
    """Return the schedule if the settings of a training fit each other; nothing is allocated.

    Raises:
        AccelkitError: the settings do not fit each other.
    """
    parsed = Schedule.parse(schedule, model.depth, model.family)
    if config.intermediate_weight:
        parts_of(parsed)  # fail here rather than after training the autoencoder
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
    """Return the autoencoder, trained by the main process unless an earlier run trained it."""
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
    """Return the autoencoder of a directory or hub id."""
    from diffusers import AutoencoderKL

    with reading(place):
        check_tensors(Path(place), what_to_do)
        vae = open_whole(AutoencoderKL, place)
    check_model(vae, place, Path(place))
    vae.register_to_config(_name_or_path="")  # would publish the path of this run
    return vae
