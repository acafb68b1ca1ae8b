"""Adapts a pretrained model to a schedule, saves it and measures its speed and quality."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from accelkit.artifact import artifact
from accelkit.artifact.names import named
from accelkit.bench.methods import parse_methods
from accelkit.bench.protocol import Protocol
from accelkit.data.shards import fingerprint
from accelkit.data.sources import ImageSource
from accelkit.errors import AccelkitError
from accelkit.jobs.bench import compare
from accelkit.jobs.inputs import (
    encoded,
    items_of,
    open_images,
    open_unscheduled,
    origin_of,
    prompted,
)
from accelkit.jobs.reporter import Reporter
from accelkit.jobs.settings import Run, Source
from accelkit.jobs.training import announce, claimed, identify, watch
from accelkit.runtime.switch import enable, fitting
from accelkit.subject import Subject
from accelkit.train import lora
from accelkit.train.config import TrainConfig
from accelkit.train.dvd import supervision_for
from accelkit.train.loop import process_for, train


def finetune(
    source: Source,
    schedule: str,
    config: TrainConfig,
    plan: Protocol | None,
    where: Run,
    reporter: Reporter,
) -> dict[str, Any]:
    """Fine-tune a model to a schedule, save it as an artifact and compare it.

    The output directory holds the artifact, ``checkpoints`` and the files of ``accelkit bench``.
    Nothing is compared without ``plan``.

    Returns:
        The content of ``results.json``: rows of full depth, of the schedule before fine-tuning, of
        the other methods of ``plan``, and of the schedule after fine-tuning. An empty dict without
        ``plan``, and on processes other than the main one.

    Raises:
        AccelkitError: an input does not fit, or a loss is not finite.
        accelkit.errors.Stopped: a signal ended the run, which can be resumed.
    """
    found = named(source.model, source.revision)
    subject = open_unscheduled(source, found)
    backbone, scheduler = subject.backbone, subject.scheduler
    parsed = fitting(schedule, backbone)
    images = open_images(source, subject)
    if plan is not None:
        plan.samplings(subject)
        parse_methods(plan.methods, subject)
    process = process_for(scheduler, config)
    supervision_for(config, backbone, parsed, scheduler, process)
    lora.check(config.lora_rank)
    if config.lora_rank:
        lora.check_rank(backbone, config.lora_rank)
        lora.check_reach(backbone, parsed)
    origin = origin_of(source, found)
    if config.lora_rank and found.config:
        raise AccelkitError(
            f"{source.model} holds weights that were tuned already, to which no adapter can be "
            f"added; train all weights, or start from {origin.model}"
        )
    settings = {
        "job": "finetune",
        "source": asdict(source),
        "schedule": parsed.to_dict(),
        "train": config.to_dict(),
        "evaluation": plan and asdict(plan),
    }
    with claimed(settings, config, where) as (run, accelerator):
        made_of = {"model": fingerprint(subject.pipe), **_captions(images, subject)}
        identify(run, accelerator, images, **made_of)
        before = _copy_of(subject) if plan else None
        latents = encoded(subject, images, source.flip, accelerator, reporter)
        announce(images, where, accelerator, reporter)
        prompts = prompted(subject, images, latents, accelerator, reporter)
        items = items_of(images, subject)
        watching = watch(subject, items, config, where, accelerator, reporter)
        subject.calls.read_factor(subject.pipe)
        adapter = train(subject, parsed, latents, config, run, accelerator, watching, prompts)
        if not accelerator.is_main_process:
            return {}

        def save(metrics: dict[str, Any]) -> None:
            with enable(subject, parsed):
                artifact.save(
                    subject,
                    where.output,
                    base_model=origin.model,
                    revision=origin.revision,
                    variant=origin.variant,
                    vae=origin.vae,
                    num_heads=origin.num_heads,
                    training={"data": source.data, "flip": source.flip, **config.to_dict()},
                    metrics=metrics,
                    adapter=adapter,
                )

        save({})  # in case measuring is interrupted
        if plan is None or before is None:
            return {}
        results = compare(
            before,
            [(parsed, subject)],
            source,
            plan,
            where.output,
            reporter,
            images=images,
            training=config.to_dict(),
        )
        save({"rows": results["rows"]})
    return results


def _captions(images: ImageSource, subject: Subject) -> dict[str, str]:
    """Return a fingerprint of the captions if the model is prompted by text."""
    if not subject.calls.text:
        return {}
    text = json.dumps(images.captions)
    return {"captions": hashlib.sha256(text.encode()).hexdigest()}


def _copy_of(subject: Subject) -> Subject:
    """Return the same pipeline around a copy of its network."""
    pipe, model = copy.copy(subject.pipe), copy.deepcopy(subject.model)
    name = next(name for name, part in pipe.components.items() if part is subject.model)
    pipe.register_modules(**{name: model})
    return replace(subject, target=pipe, model=model)
