"""Compares methods with full depth on one model and writes a report."""

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

from accelkit.artifact.names import named
from accelkit.bench.comparison import Comparison
from accelkit.bench.judging import Judge
from accelkit.bench.protocol import Protocol
from accelkit.bench.report.report import write_report
from accelkit.bench.results import RESULTS, SCHEMA, commit, machine, read_results, write_results
from accelkit.bench.timing import Stopwatch
from accelkit.data.sources import ImageSource
from accelkit.errors import AccelkitError
from accelkit.jobs.inputs import items_of, open_images, open_unscheduled, origin_of
from accelkit.jobs.reporter import Reporter, Silent
from accelkit.jobs.sample import parse_labels
from accelkit.jobs.settings import Source
from accelkit.metrics.extractors import open_extractor
from accelkit.metrics.references import open_reference
from accelkit.sample.many import World
from accelkit.schedule import Schedule
from accelkit.subject import Subject
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
    """Compare, write a report, and return the content of ``results.json`` (see its schema).

    Measurements in ``output`` with the same settings are not repeated, so that the same call
    continues a killed run. For an artifact, all methods run on the weights of its base model, and
    the schedule that it was tuned for on its tuned weights as well.

    Under ``accelerate launch`` all processes make images and the main one measures time. It returns
    the results, and the others return an empty dict.

    Args:
        output: the directory, made if missing.
        tuned: directories of artifacts to compare as well, by the schedules that they are tuned
            for.
        published: published figures to show next to the measured ones, as in the schema.
        overwrite: measure everything again.

    Raises:
        AccelkitError: an input does not fit.
    """
    world = World.launched()
    found = named(source.model, source.revision)
    recorded = _prepare(output, overwrite) if world.main else None
    subject = open_unscheduled(origin_of(source, found), None if found.config else found)
    weights: list[tuple[Schedule, Subject]] = []
    if found.config:
        schedule = Schedule.from_dict(found.config["schedule"])
        weights.append((schedule, open_unscheduled(source, found)))
    weights += [_tuned(text, folder, source, subject) for text, folder in (tuned or {}).items()]
    schedules = [schedule for schedule, _ in weights]
    if twice := [s for s in schedules if schedules.count(s) > 1]:
        raise AccelkitError(
            f"there are two sets of weights tuned for {twice[0].name or twice[0]}; give one of them"
        )
    return compare(
        subject,
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
    subject: Subject,
    tuned: Sequence[tuple[Schedule, Subject]],
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
    """Run the comparison of :func:`bench` on pipelines that are open, without a schedule.

    Args, where they differ from those of :func:`bench`:
        subject: the pipeline with its own weights.
        tuned: schedules, each with a pipeline whose weights are tuned for it.
        images: the data of ``source``, if they are open and reported already.
        world: the processes. Default: this one alone.
        training: the training of the tuned weights, for the record.
        recorded: the feature extractor of earlier results in ``output``.
    """
    world = world or World()
    reporter = reporter if world.main else Silent()
    reported = images is not None
    images = images or open_images(source, subject)
    items = items_of(images, subject)
    if plan.labels:
        if items == (None,) or any(isinstance(item, str) for item in items):
            kind = type(subject.model).__name__
            raise AccelkitError(f"this {kind} has no classes; leave --labels out")
        items = tuple(parse_labels(plan.labels))
        subject.calls.encode(subject.pipe, items)  # refuses classes that the model lacks
    comparison = Comparison(subject, tuned, plan, items, output / CELLS, world, reporter.advance)
    size = subject.calls.pixels(subject.pipe)
    for turn in (True, False):  # the main process first: it caches the features of the reference
        if world.main is turn:
            comparison.judge = _judge(plan, images, size, reporter, recorded)
        world.wait()
    with comparison.cells.claimed() if world.main else nullcontext():
        if overwrite and world.main:
            comparison.cells.clear()
            shutil.rmtree(output / SAMPLES, ignore_errors=True)
            (output / RESULTS).unlink(missing_ok=True)
        world.wait()
        if not reported:
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
    """Return the feature extractor of earlier results; None without any, or to overwrite them.

    Raises:
        AccelkitError: ``output`` holds something other than a bench.
    """
    if output.exists() and not output.is_dir():
        raise AccelkitError(f"the output {output} is a file; give a directory")
    if (output / SETTINGS).exists():
        raise AccelkitError(f"{output} holds a training run; give another -o")
    if overwrite or not (output / RESULTS).exists():
        return None
    return read_results(output / RESULTS)["protocol"]["extractor"]


def _tuned(text: str, folder: str, source: Source, subject: Subject) -> tuple[Schedule, Subject]:
    """Open the artifact in ``folder``, which has to be tuned for a schedule of the same network."""
    backbone = subject.backbone
    schedule = Schedule.parse(text, backbone.depth, backbone.family)
    found = named(folder)
    if found.config is None:
        raise AccelkitError(
            f"{folder} holds no model that was fine-tuned to a schedule; give one of accelkit "
            f"finetune for {text}"
        )
    if (other := Schedule.from_dict(found.config["schedule"])) != schedule:
        raise AccelkitError(
            f"{folder} is tuned for {other.name or other}, not for {text}; give the one that is"
        )
    own = replace(source, model=folder, revision=None, variant=None, vae=None, num_heads=None)
    tuned = open_unscheduled(own, found)
    if _network(tuned) != _network(subject):
        raise AccelkitError(
            f"{folder} is tuned from another network than {source.model}; give one that was made "
            "of it"
        )
    return schedule, tuned


def _network(subject: Subject) -> tuple[type, dict[str, Any]]:
    """Return the class and the sizes of a network."""
    return type(subject.model), {k: v for k, v in subject.model.config.items() if k[0] != "_"}


def _judge(
    plan: Protocol,
    images: ImageSource,
    size: int,
    reporter: Reporter,
    recorded: dict[str, Any] | None,
) -> Judge | None:
    """Return what images are judged by, None if accelkit has no feature extractor for them."""
    if plan.features is None and (images.name != "digits" or size != 32):
        if plan.reference or plan.features_sha256:
            raise AccelkitError(
                f"accelkit has no feature extractor for {images.name} at {size}x{size}; give "
                "--features with --reference or --features-sha256"
            )
        reporter.say(
            f"accelkit has no feature extractor for {images.name} at {size}x{size}, so quality is "
            "not measured; accelkit bench takes one as --features"
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
            f"the results there were measured by {recorded['name']} with SHA-256 "
            f"{recorded['sha256'][:12]}…, this is {extractor.name} with {extractor.sha256[:12]}…, "
            "and figures of the two do not compare; give the same --features, another -o, or "
            "--overwrite"
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
    model, backbone = comparison.subject.model, comparison.subject.backbone
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
