"""Compare schedules with full depth on one model, and leave table, plot and pictures."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from accelkit import artifact
from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.conditioning import Item
from accelkit.bench import report
from accelkit.bench.compare import Variant, Work, compare, reference_moments
from accelkit.data.sources import ImageSource, iter_images
from accelkit.errors import AccelkitError
from accelkit.jobs.common import (
    Evaluation,
    Reporter,
    Source,
    image_size,
    items_of,
    open_images,
    open_unscheduled,
    save_picture,
)
from accelkit.metrics.features import FeatureExtractor, extractor
from accelkit.metrics.frechet import Moments
from accelkit.sample.generate import generate, grid
from accelkit.schedule import Schedule
from accelkit.switch import enable

SAMPLES = "samples.png"


def bench(
    source: Source,
    schedules: list[str],
    evaluation: Evaluation,
    output: Path,
    overwrite: bool,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Compare ``schedules`` with full depth and return the rows of ``results.json``.

    Of an artifact, all of them run on its base model's weights, and the schedule it was tuned for
    on the tuned ones as well.

    Raises:
        AccelkitError: results are there already, or any input does not fit.
    """
    if output.exists() and not output.is_dir():
        raise AccelkitError(f"the output {output} is a file; give a directory")
    if (output / report.RESULTS).exists() and not overwrite:
        raise AccelkitError(
            f"{output / report.RESULTS} exists; replace it with --overwrite or give another -o"
        )
    config = artifact.config_of(source.model, source.revision)
    tuned = open_unscheduled(source) if config else None
    pipe = open_unscheduled(replace(source, **artifact.base_of(config)) if config else source)
    evaluation = evaluation.check(pipe)
    tuned_for = Schedule.from_dict(config["schedule"]) if config else None
    backbone = backbone_of(denoiser_of(pipe))
    parsed = [Schedule.parse(text, backbone.depth, backbone.family) for text in schedules]
    return measure(pipe, parsed, tuned, tuned_for, source, evaluation, output, reporter, {})


def measure(
    pipe: Any,
    schedules: list[Schedule],
    tuned: Any | None,
    tuned_for: Schedule | None,
    source: Source,
    evaluation: Evaluation,
    output: Path,
    reporter: Reporter,
    protocol: dict[str, Any],
) -> list[dict[str, Any]]:
    """Run the comparison and write ``results.json``, a plot and samples at equal seeds.

    The Fréchet distance is taken where a feature extractor for the data comes with accelkit, which
    is so for the digits; elsewhere it is null.

    Args:
        pipe: the pipeline with its own weights, without a schedule.
        schedules: run on ``pipe``; full depth is put first if it is not among them, the
            evaluation's baselines last.
        tuned: the pipeline with tuned weights, None if there is none.
        tuned_for: the schedule that ``tuned`` is run with.
        source: names of model and data.
        evaluation: how.
        output: directory, made if missing.
        reporter: told how far it is.
        protocol: more to record beside the rows.
    """
    model = denoiser_of(pipe)
    depth = backbone_of(model).depth
    full = Schedule.uniform(depth, depth, "full")
    wanted = [full, *(s for s in schedules if s != full)]
    wanted += [s for s in evaluation.baselines_of(model) if s not in wanted]
    if tuned_for is not None and tuned_for not in wanted:
        wanted.append(tuned_for)
    variants = [Variant(pipe, schedule) for schedule in wanted]
    if tuned is not None and tuned_for is not None:
        variants.append(Variant(tuned, tuned_for, tuned=True))
    images = open_images(source, model)
    items = items_of(images, model)
    how = evaluation.sampling
    work = Work(
        evaluation.images,
        evaluation.batch_size,
        how,
        items,
        evaluation.seed,
        evaluation.kernels,
    )
    features, reference = _quality(images, image_size(pipe))
    if features is None:
        size = image_size(pipe)
        reporter.say(
            f"no feature extractor for {images.name} at {size}x{size} comes with accelkit: "
            "fid is null"
        )
    elif evaluation.images < 2:
        reporter.say("a Fréchet distance needs at least 2 images: fid is null")
    rows = compare(
        variants,
        work,
        features,
        reference,
        lambda done, total: reporter.advance("comparing", done, total),
    )
    output.mkdir(parents=True, exist_ok=True)
    report.write_results(
        output,
        {
            "model": source.model,
            **protocol,
            "data": {"name": images.name, "fingerprint": images.fingerprint, "n": len(images)},
            "evaluation": asdict(evaluation),
            "classes": len(items),
            "features": features and {"name": features.name, "sha256": features.sha256},
            "order": "interleaved batch by batch; saving = median over batches of 1 - time / full",
        },
        rows,
    )
    report.plot(output / report.PLOT, rows, f"{how.sampler.upper()}, {how.steps} steps")
    _write_samples(variants, items, evaluation, output / SAMPLES)
    return rows


def _quality(images: ImageSource, size: int) -> tuple[FeatureExtractor | None, Moments | None]:
    if images.name != "digits" or size != 32:
        return None, None
    features = extractor("digits")
    batches = (batch for _, batch in iter_images(images, size, 256))
    return features, reference_moments(batches, features)


def _write_samples(
    variants: list[Variant], items: tuple[Item, ...], evaluation: Evaluation, path: Path
) -> None:
    """One row of images per variant, the same labels and seeds in every row."""
    chosen = [items[i % len(items)] for i in range(10)]
    seeds = [evaluation.seed + i for i in range(10)]
    pictures = []
    for variant in variants:
        with enable(variant.pipe, variant.schedule, kernels=evaluation.kernels):
            pictures.append(generate(variant.pipe, chosen, seeds, evaluation.sampling))
    save_picture(grid(np.concatenate(pictures), columns=10), path)
