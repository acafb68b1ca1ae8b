"""Adapt a pretrained model to a schedule, save it and measure what it gained and kept."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

from accelkit import artifact
from accelkit.backbones import backbone_of, denoiser_of
from accelkit.jobs.common import (
    Evaluation,
    Reporter,
    Run,
    Source,
    claimed,
    encoded,
    open_images,
    open_unscheduled,
    watch,
)
from accelkit.jobs.compare import measure
from accelkit.schedule import Schedule
from accelkit.switch import enable
from accelkit.train.config import TrainConfig
from accelkit.train.loop import train


def finetune(
    source: Source,
    schedule: str,
    config: TrainConfig,
    evaluation: Evaluation,
    where: Run,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Fine-tune, save and compare.

    Leaves in the output directory the artifact, ``checkpoints``, ``results.json``, a plot and a
    picture of samples at equal seeds. Returns the rows of the comparison (none on processes other
    than the main one): full depth, the schedule before fine-tuning and after.

    Raises:
        AccelkitError: any input that does not fit, or a loss that is not finite.
        accelkit.train.loop.Stopped: a signal ended it; it can be resumed.
    """
    pipe = open_unscheduled(source)
    model = denoiser_of(pipe)
    backbone = backbone_of(model)
    parsed = Schedule.parse(schedule, backbone.depth, backbone.family)
    images = open_images(source, model)
    evaluation.check(pipe.scheduler)
    settings = {
        "job": "finetune",
        "source": asdict(source),
        "schedule": parsed.to_dict(),
        "train": config.to_dict(),
        "evaluation": asdict(evaluation),
    }
    with claimed(settings, config, where) as (run, accelerator):
        before = copy.copy(pipe)  # the same pipeline around weights of its own
        before.register_modules(transformer=copy.deepcopy(model))
        latents = encoded(pipe, images, source.flip, accelerator, reporter)
        watching = watch(pipe, len(images.classes), config, where, accelerator, reporter)
        train(model, pipe.scheduler, parsed, latents, config, run, accelerator, watching)
        if not accelerator.is_main_process:
            return []
        tuned = artifact.config_of(source.model, source.revision)
        origin = replace(source, **artifact.base_of(tuned)) if tuned else source

        def save(metrics: dict[str, Any]) -> None:
            with enable(pipe, parsed):
                artifact.save(
                    pipe,
                    where.output,
                    base_model=origin.model,
                    revision=origin.revision,
                    vae=origin.vae,
                    num_heads=origin.num_heads,
                    training={"data": source.data, "flip": source.flip, **config.to_dict()},
                    metrics=metrics,
                )

        save({})  # before measuring, which can be interrupted
        protocol = {"training": config.to_dict()}
        rows = measure(
            before, [parsed], pipe, parsed, source, evaluation, where.output, reporter, protocol
        )
        save({"rows": rows})
    return rows
