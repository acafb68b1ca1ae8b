"""Compare methods with full depth on one model, and leave a report."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from accelkit.artifact import artifact
from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.conditioning import conditioning_of
from accelkit.bench.comparison import Comparison
from accelkit.bench.judging import Judge
from accelkit.bench.protocol import Protocol
from accelkit.bench.report.report import write_report
from accelkit.bench.results import RESULTS, SCHEMA, commit, machine, read_results, write_results
from accelkit.bench.timing import Stopwatch
from accelkit.data.sources import ImageSource
from accelkit.errors import AccelkitError
from accelkit.jobs.common import (
    Reporter,
    Silent,
    Source,
    image_size,
    items_of,
    open_images,
    open_unscheduled,
)
from accelkit.jobs.sample import parse_labels
from accelkit.metrics.extractors import open_extractor
from accelkit.metrics.references import open_reference
from accelkit.sample.many import World
from accelkit.schedule import Schedule
from accelkit.train.rundir import SETTINGS
from accelkit.version import __version__

CELLS, SAMPLES = "cells", "samples"


def bench(
    source: Source,
    plan: Protocol,
    output: Path,
    reporter: Reporter,
    *,
    tuned: Mapping[str, str] | None = None,
    published: Sequence[dict[str, Any]] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compare, write a report, and return what ``results.json`` holds; see its schema.

    Whatever was measured there before with the same settings is not measured again, so that a run
    that was killed goes on with the same call. Of an artifact, all methods run on its base model's
    weights, and the schedule it was tuned for on the tuned ones as well.

    Under ``accelerate launch`` all processes make images and the main one measures time; only that
    one returns results, the others an empty dict.

    Args:
        source: names of model and data.
        plan: what and how.
        output: directory, made if missing.
        reporter: told how far it is.
        tuned: directories of artifacts by the schedules that they are tuned for and compared with.
        published: figures that are shown beside the measured ones, as the schema has them.
        overwrite: forget what was measured there before.

    Raises:
        AccelkitError: any input that does not fit.
    """
    world = World.launched()
    config = artifact.config_of(source.model, source.revision)
    origin = replace(source, **artifact.base_of(config)) if config else source
    recorded = _prepare(output, overwrite) if world.main else None
    pipe = open_unscheduled(origin)
    weights: list[tuple[Schedule, Any]] = []
    if config:
        weights.append((Schedule.from_dict(config["schedule"]), open_unscheduled(source)))
    weights += [_tuned(text, folder, source, pipe) for text, folder in (tuned or {}).items()]
    schedules = [schedule for schedule, _ in weights]
    if twice := [s for s in schedules if schedules.count(s) > 1]:
        raise AccelkitError(
            f"there are two sets of weights tuned for {twice[0].name or twice[0]}; give one of them"
        )
    return compare(
        pipe,
        weights,
        source,
        plan,
        output,
        reporter,
        world=world,
        published=published,
        recorded=recorded,
        overwrite=overwrite,
    )


def compare(
    pipe: Any,
    tuned: Sequence[tuple[Schedule, Any]],
    source: Source,
    plan: Protocol,
    output: Path,
    reporter: Reporter,
    *,
    images: ImageSource | None = None,
    world: World | None = None,
    published: Sequence[dict[str, Any]] = (),
    training: dict[str, Any] | None = None,
    recorded: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run the comparison on pipelines that are open, without a schedule; see :func:`bench`.

    Args:
        pipe: with its own weights.
        tuned: schedules, and pipelines with weights tuned for each.
        source: names of model and data.
        plan: what and how.
        output: directory.
        reporter: told how far it is.
        images: the data of ``source``, if they are open, and described, already.
        world: the processes, by default this one alone.
        published: figures that are shown beside the measured ones.
        training: how the tuned weights were made, for the record.
        recorded: the feature extractor of results that are there.
        overwrite: forget what was measured there before.
    """
    world = world or World()
    reporter = reporter if world.main else Silent()
    model = denoiser_of(pipe)
    told = images is not None
    images = images or open_images(source, model)
    items = items_of(images, model)
    if plan.labels:
        if items == (None,) or any(isinstance(item, str) for item in items):
            raise AccelkitError(f"this {type(model).__name__} has no classes; leave --labels out")
        items = tuple(parse_labels(plan.labels))
        conditioning_of(backbone_of(model)).encode(pipe, items)  # refuses classes that it lacks
    comparison = Comparison(pipe, tuned, plan, items, output / CELLS, world, reporter.advance)
    for turn in (True, False):  # the main process first, whose features of the reference are kept
        if world.main is turn:
            comparison.judge = _judge(plan, images, image_size(pipe), reporter, recorded)
        world.meet()
    with comparison.cells.claimed() if world.main else nullcontext():
        if overwrite and world.main:
            comparison.cells.clear()
            shutil.rmtree(output / SAMPLES, ignore_errors=True)
            (output / RESULTS).unlink(missing_ok=True)
        world.meet()
        if not told:
            reporter.say(f"comparing with {images.summary()}")
        measured = comparison.run()
    if not world.main:
        return {}
    results = {
        "schema": SCHEMA,
        "protocol": _protocol(comparison, source, images, training),
        **measured,
        "published": list(published),
    }
    write_results(output, results)
    write_report(output, results)
    return results


def _prepare(output: Path, overwrite: bool) -> dict[str, Any] | None:
    """Refuse a place that holds something else.

    Returns the feature extractor of the results that are there, None without or to ``overwrite``.
    """
    if output.exists() and not output.is_dir():
        raise AccelkitError(f"the output {output} is a file; give a directory")
    if (output / SETTINGS).exists():
        raise AccelkitError(f"{output} holds a training run; give another -o")
    if overwrite or not (output / RESULTS).exists():
        return None
    return read_results(output / RESULTS)["protocol"]["extractor"]


def _tuned(text: str, folder: str, source: Source, pipe: Any) -> tuple[Schedule, Any]:
    """Open weights that are said to be tuned for a schedule of ``pipe``'s network."""
    model = denoiser_of(pipe)
    backbone = backbone_of(model)
    schedule = Schedule.parse(text, backbone.depth, backbone.family)
    config = artifact.config_of(folder)
    if config is None:
        raise AccelkitError(
            f"{folder} holds no model that was fine-tuned to a schedule; give one of accelkit "
            f"finetune for {text}"
        )
    if (found := Schedule.from_dict(config["schedule"])) != schedule:
        raise AccelkitError(
            f"{folder} is tuned for {found.name or found}, not for {text}; give the one that is"
        )
    tuned = open_unscheduled(
        replace(source, model=folder, revision=None, variant=None, vae=None, num_heads=None)
    )
    if _network(tuned) != _network(pipe):
        raise AccelkitError(
            f"{folder} is tuned from another network than {source.model}; give one that was made "
            "of it"
        )
    return schedule, tuned


def _network(pipe: Any) -> tuple[type, dict[str, Any]]:
    model: Any = denoiser_of(pipe)
    return type(model), {k: v for k, v in model.config.items() if k[0] != "_"}


def _judge(
    plan: Protocol,
    images: ImageSource,
    size: int,
    reporter: Reporter,
    recorded: dict[str, Any] | None,
) -> Judge | None:
    """Return what images are judged by, None where nothing for such images comes with accelkit."""
    if plan.features is None and (images.name != "digits" or size != 32):
        if plan.reference or plan.features_sha256:
            raise AccelkitError(
                f"nothing that comes with accelkit judges {images.name} at {size}x{size}; give "
                "--features beside --reference or --features-sha256"
            )
        reporter.say(
            f"no feature extractor for {images.name} at {size}x{size} comes with accelkit, so "
            "there are no figures of quality; accelkit bench takes one by --features"
        )
        return None
    extractor = open_extractor(
        plan.features or "digits",
        plan.features_sha256,
        image_size=size,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    if recorded and (extractor.name, extractor.sha256) != (recorded["name"], recorded["sha256"]):
        raise AccelkitError(
            f"the results there are by {recorded['name']} with SHA-256 {recorded['sha256'][:12]}…, "
            f"this is {extractor.name} with {extractor.sha256[:12]}…; figures of the two do not "
            "compare: give the same --features, another -o, or --overwrite"
        )
    reference = open_reference(
        plan.reference or images,
        extractor,
        size,
        on_images=lambda done, total: reporter.advance("reference", done, total),
    )
    return Judge(extractor, reference)


def _protocol(
    comparison: Comparison, source: Source, images: ImageSource, training: dict[str, Any] | None
) -> dict[str, Any]:
    plan, judge = comparison.plan, comparison.judge
    model: Any = denoiser_of(comparison.pipe)
    backbone = backbone_of(model)
    return {
        "command": shlex.join(["accelkit", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "accelkit": __version__,
        "commit": commit(),
        "model": {
            "name": source.model,
            "revision": source.revision,
            "class": type(model).__name__,
            "family": backbone.family,
            "blocks": backbone.depth,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "tuned_for": ", ".join(s.name or str(s) for s, _ in comparison.tuned) or None,
        "training": training,
        "data": {"name": images.name, "fingerprint": images.fingerprint, "n": len(images)},
        "images": plan.images,
        "seed": plan.seed,
        "classes": len(comparison.items),
        "labels": plan.labels or "balanced",
        "batch_size": plan.batch_size,
        "guidance": plan.guidance,
        "guidance_channels": plan.guidance_channels,
        "kernels": plan.kernels,
        "samplers": [f"{how.sampler}:{how.steps}" for how in comparison.samplings],
        "first_levels": comparison.first_levels,
        "rounding": "round(255 x) to uint8",
        "extractor": judge and judge.extractor.record(),
        "reference": judge and judge.reference.record(),
        "timing": {
            "rounds": plan.rounds,
            "batch_size": plan.timing_batch_size,
            "order": "interleaved, A B C A B C",
            "clock": Stopwatch(model.device).clock,
            "warmup": "one whole call of each, and two steps before every counted one",
        },
        "machine": machine(),
    }
