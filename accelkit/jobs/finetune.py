"""Adapt a pretrained model to a schedule, save it and measure what it gained and kept."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

from accelkit import artifact
from accelkit.backbones import backbone_of, denoiser_of
from accelkit.errors import AccelkitError
from accelkit.jobs.common import (
    Evaluation,
    Reporter,
    Run,
    Source,
    claimed,
    encoded,
    items_of,
    open_images,
    open_unscheduled,
    prompted,
    watch,
)
from accelkit.jobs.compare import measure
from accelkit.schedule import Schedule
from accelkit.switch import enable
from accelkit.train import lora
from accelkit.train.config import TrainConfig
from accelkit.train.dvd import supervision_for
from accelkit.train.loop import process_for, train


def finetune(
    source: Source,
    schedule: str,
    config: TrainConfig,
    evaluation: Evaluation | None,
    where: Run,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Fine-tune, save and compare.

    Leaves in the output directory the artifact, ``checkpoints``, ``results.json``, a plot and a
    picture of samples at equal seeds. Returns the rows of the comparison (none on processes other
    than the main one): full depth, the schedule before fine-tuning, baselines, the schedule after.
    Without ``evaluation`` nothing is compared and there are none.

    Raises:
        AccelkitError: any input that does not fit, or a loss that is not finite.
        accelkit.errors.Stopped: a signal ended it; it can be resumed.
    """
    pipe = open_unscheduled(source)
    model = denoiser_of(pipe)
    backbone = backbone_of(model)
    parsed = Schedule.parse(schedule, backbone.depth, backbone.family)
    images = open_images(source, model)
    evaluation = evaluation and evaluation.check(pipe)
    process = process_for(pipe.scheduler, config)
    supervision_for(config, backbone, parsed, pipe.scheduler, process)
    lora.check(config.lora_rank)
    if config.lora_rank:
        lora.check_reach(backbone, parsed)
    tuned = artifact.config_of(source.model, source.revision)
    origin = replace(source, **artifact.base_of(tuned)) if tuned else source
    if config.lora_rank and tuned:
        raise AccelkitError(
            f"{source.model} holds weights that were tuned already, to which no adapter can be "
            f"added; train all weights, or start from {origin.model}"
        )
    if evaluation is not None:
        evaluation.baselines_of(model)
    settings = {
        "job": "finetune",
        "source": asdict(source),
        "schedule": parsed.to_dict(),
        "train": config.to_dict(),
        "evaluation": evaluation and asdict(evaluation),
    }
    with claimed(settings, config, where) as (run, accelerator):
        before = copy.copy(pipe)  # the same pipeline around weights of its own
        name = next(name for name, part in pipe.components.items() if part is model)
        before.register_modules(**{name: copy.deepcopy(model)})
        latents = encoded(pipe, images, source.flip, accelerator, reporter)
        prompts = prompted(pipe, images, latents, accelerator, reporter)
        items = items_of(images, model)
        watching = watch(pipe, items, config, where, accelerator, reporter)
        adapter = train(
            model, pipe.scheduler, parsed, latents, config, run, accelerator, watching, prompts
        )
        if not accelerator.is_main_process:
            return []

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
                    adapter=adapter,
                )

        save({})  # before measuring, which can be interrupted
        if evaluation is None:
            return []
        protocol = {"training": config.to_dict()}
        rows = measure(
            before, [parsed], pipe, parsed, source, evaluation, where.output, reporter, protocol
        )
        save({"rows": rows})
    return rows
