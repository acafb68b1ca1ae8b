"""Adapt a pretrained model to a schedule, save it and measure what it gained and kept."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from accelkit.artifact import artifact
from accelkit.backbones import Backbone, backbone_of, denoiser_of
from accelkit.backbones.conditioning import conditioning_of
from accelkit.bench.methods import parse_methods
from accelkit.bench.protocol import Protocol
from accelkit.data.shards import fingerprint
from accelkit.data.sources import ImageSource
from accelkit.errors import AccelkitError
from accelkit.jobs.bench import compare
from accelkit.jobs.common import (
    Reporter,
    Run,
    Source,
    announce,
    claimed,
    encoded,
    identify,
    items_of,
    open_images,
    open_unscheduled,
    prompted,
    watch,
)
from accelkit.runtime.switch import enable, fitting
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
    """Fine-tune, save and compare.

    Leaves in the output directory the artifact, ``checkpoints``, and what ``accelkit bench`` does.
    Returns what ``results.json`` holds: rows of full depth, the schedule before fine-tuning, what
    else ``plan`` has, the schedule after; on processes other than the main one an empty dict.
    Without ``plan`` nothing is compared.

    Raises:
        AccelkitError: any input that does not fit, or a loss that is not finite.
        accelkit.errors.Stopped: a signal ended it; it can be resumed.
    """
    pipe = open_unscheduled(source)
    model = denoiser_of(pipe)
    backbone = backbone_of(model)
    parsed = fitting(schedule, backbone)
    images = open_images(source, model)
    if plan is not None:
        plan.samplings(pipe)
        parse_methods(plan.methods, model)
    process = process_for(pipe.scheduler, config)
    supervision_for(config, backbone, parsed, pipe.scheduler, process)
    lora.check(config.lora_rank)
    if config.lora_rank:
        lora.check_rank(backbone, config.lora_rank)
        lora.check_reach(backbone, parsed)
    tuned = artifact.config_of(source.model, source.revision)
    origin = replace(source, **artifact.base_of(tuned)) if tuned else source
    if config.lora_rank and tuned:
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
        identify(run, accelerator, images, model=fingerprint(pipe), **_captions(images, backbone))
        before = _own_copy(pipe) if plan else None
        latents = encoded(pipe, images, source.flip, accelerator, reporter)
        announce(images, where, accelerator, reporter)
        prompts = prompted(pipe, images, latents, accelerator, reporter)
        items = items_of(images, model)
        watching = watch(pipe, items, config, where, accelerator, reporter)
        adapter = train(
            model,
            pipe.scheduler,
            parsed,
            latents,
            config,
            run,
            accelerator,
            watching,
            prompts,
            conditioning_of(backbone, pipe),
        )
        if not accelerator.is_main_process:
            return {}

        def save(metrics: dict[str, Any]) -> None:
            with enable(pipe, parsed):
                artifact.save(
                    pipe,
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

        save({})  # before measuring, which can be interrupted
        if plan is None or before is None:
            return {}
        results = compare(
            before,
            [(parsed, pipe)],
            source,
            plan,
            where.output,
            reporter,
            images=images,
            training=config.to_dict(),
        )
        save({"rows": results["rows"]})
    return results


def _captions(images: ImageSource, backbone: Backbone) -> dict[str, str]:
    """Return a fingerprint of the captions, if the model is prompted by text."""
    if not conditioning_of(backbone).text:
        return {}
    text = json.dumps(images.captions)
    return {"captions": hashlib.sha256(text.encode()).hexdigest()}


def _own_copy(pipe: Any) -> Any:
    """Return the same pipeline around a denoiser of its own."""
    model = denoiser_of(pipe)
    made = copy.copy(pipe)
    name = next(name for name, part in pipe.components.items() if part is model)
    made.register_modules(**{name: copy.deepcopy(model)})
    return made
