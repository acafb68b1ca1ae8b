"""The jobs behind the commands: fine-tune, train from scratch, compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from accelkit import artifact
from accelkit.assets import BUILTIN
from accelkit.backbones import backbone_of, denoiser_of
from accelkit.bench import report
from accelkit.bench.compare import Variant, Work, compare, reference_moments
from accelkit.data.latents import Latents, encode_latents
from accelkit.data.sources import ImageSource, iter_images, open_source
from accelkit.enable import disable, enable, enabled_on
from accelkit.errors import AccelkitError
from accelkit.metrics.features import FeatureExtractor, extractor
from accelkit.metrics.frechet import Moments
from accelkit.sample.generate import Sampling, generate, grid
from accelkit.schedule import Schedule
from accelkit.train.config import TrainConfig
from accelkit.train.loop import Progress, Watch, make_accelerator, train
from accelkit.train.rundir import RunDirectory


class Reporter(Protocol):
    """Where a job tells what it does; the command line draws it."""

    def say(self, text: str) -> None:
        """Print a line."""

    def advance(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` parts of ``task`` are finished."""


@dataclass(frozen=True)
class Source:
    """Which model and data a job works on.

    Attributes:
        model: as :func:`accelkit.from_pretrained` takes it.
        data: ``digits``, a folder or a zip.
        revision: of a hub id.
        skip_bad: go on without images that cannot be read, and count them.
        flip: train on mirrored images as well.
    """

    model: str = BUILTIN
    data: str = "digits"
    revision: str | None = None
    skip_bad: bool = False
    flip: bool = False


@dataclass(frozen=True)
class Evaluation:
    """How variants are compared: images, batch size, first seed, sampler."""

    images: int = 1000
    batch_size: int = 250
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Run:
    """Where a run goes and how it is watched."""

    output: Path
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: int = 100
    keep: int = 2
    preview_every: int = 0
    report_to: str | None = None


_FREE = frozenset({"evaluation"})  # may differ when a run is resumed


def open_model(source: Source) -> Any:
    """Return the pipeline a job works on, without a schedule in force."""
    pipe = artifact.from_pretrained(source.model, revision=source.revision)
    if enabled_on(pipe) is not None:
        disable(pipe)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def finetune(
    source: Source,
    schedule: str,
    config: TrainConfig,
    evaluation: Evaluation,
    where: Run,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Adapt a pretrained model to a schedule, save it and measure what it gained and kept.

    Leaves in the output directory: the artifact, ``checkpoints``, ``results.json``, a plot and a
    picture of samples at equal seeds. Returns the rows of the comparison (empty on processes other
    than the main one): full depth, the schedule before and after fine-tuning.

    Raises:
        AccelkitError: any input that does not fit, or a loss that is not finite.
        accelkit.train.loop.Stopped: a signal ended it; it can be resumed.
    """
    pipe = open_model(source)
    model = denoiser_of(pipe)
    backbone = backbone_of(model)
    parsed = Schedule.parse(schedule, backbone.depth, backbone.family)
    images = _open_images(source, model)
    settings = {
        "job": "finetune",
        **asdict(source),
        "schedule": parsed.to_dict(),
        "train": config.to_dict(),
        "evaluation": asdict(evaluation),
    }
    base = copy.deepcopy(model)
    with _prepared(settings, config, where) as (run, accelerator):
        latents = _encoded(pipe, images, source.flip, accelerator, reporter)
        watch = _watch(where, config, reporter, accelerator, lambda: pipe, images)
        train(model, pipe.scheduler, parsed, latents, config, run, accelerator, watch)
        if not accelerator.is_main_process:
            return []
        save = _saver(pipe, source, parsed, config, where.output)
        save({})
        before = type(pipe)(**{**pipe.components, "transformer": base.to(pipe.device)})
        before.set_progress_bar_config(disable=True)
        full = Schedule.uniform(backbone.depth, backbone.depth, "full")
        variants = [Variant(before, full), Variant(before, parsed), Variant(pipe, parsed, True)]
        rows = measure(
            [variants[0], *variants[2:]] if parsed.depths == full.depths else variants,
            images,
            evaluation,
            where.output,
            reporter,
            protocol={"model": source.model, "training": config.to_dict()},
        )
        save({"rows": rows})
    return rows


def measure(
    variants: list[Variant],
    images: ImageSource,
    evaluation: Evaluation,
    output: Path,
    reporter: Reporter,
    protocol: dict[str, Any],
) -> list[dict[str, Any]]:
    """Compare variants; write ``results.json``, a plot and samples at equal seeds to ``output``.

    The Fréchet distance is taken where a feature extractor for the data comes with accelkit, which
    is so for the digits; elsewhere it is null.
    """
    model = denoiser_of(variants[0].pipe)
    classes = tuple(range(len(images.classes) or 1)) if images.labels is not None else (_null(model),)
    sampling = evaluation.sampling
    work = Work(evaluation.images, evaluation.batch_size, sampling, classes, evaluation.seed)
    features, reference = _quality(images, image_size(variants[0].pipe))
    if features is None:
        reporter.say(f"no feature extractor for {images.name} comes with accelkit: fid is null")
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
            **protocol,
            "data": {"name": images.name, "fingerprint": images.fingerprint, "n": len(images)},
            "evaluation": asdict(evaluation),
            "classes": len(classes),
            "features": features and {"name": features.name, "sha256": features.sha256},
            "order": "interleaved batch by batch; saving = median over batches of 1 - time / full",
        },
        rows,
    )
    report.plot(output / report.PLOT, rows, f"{sampling.sampler.upper()}-{sampling.steps}")
    _write_samples(variants, classes, sampling, evaluation.seed, output / "samples.png")
    return rows


def bench(
    source: Source,
    schedules: list[str],
    evaluation: Evaluation,
    output: Path,
    overwrite: bool,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Compare schedules against full depth on one model.

    Of an artifact the tuned weights run the schedules, and full depth as well.
    """
    if (output / report.RESULTS).exists() and not overwrite:
        raise AccelkitError(
            f"{output / report.RESULTS} exists; replace it with --overwrite or give another -o"
        )
    if output.exists() and not output.is_dir():
        raise AccelkitError(f"the output {output} is a file; give a directory")
    pipe = open_model(source)
    model = denoiser_of(pipe)
    backbone = backbone_of(model)
    tuned = artifact.tuned_schedule(source.model, source.revision)
    parsed = [Schedule.parse(text, backbone.depth, backbone.family) for text in schedules]
    variants = [Variant(pipe, s, tuned is not None and s == tuned) for s in parsed]
    if not any(v.full for v in variants):
        variants.insert(0, Variant(pipe, Schedule.uniform(backbone.depth, backbone.depth, "full")))
    images = _open_images(source, model)
    return measure(variants, images, evaluation, output, reporter, {"model": source.model})


def image_size(pipe: Any) -> int:
    """Return height and width in pixels of a pipeline's images."""
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    return denoiser_of(pipe).config.sample_size * factor  # type: ignore[union-attr, operator]


def _open_images(source: Source, model: Any) -> ImageSource:
    images = open_source(source.data, skip_bad=source.skip_bad)
    if len(images.classes) > _null(model):
        raise AccelkitError(
            f"{source.data} has {len(images.classes)} classes, the model has {_null(model)}; "
            "leave some out or give another model"
        )
    return images


def _null(model: Any) -> int:
    return model.config.num_embeds_ada_norm


class _prepared:  # noqa: N801 - used as a with statement
    """The open run directory and the accelerator, closed whatever happens."""

    def __init__(self, settings: dict[str, Any], config: TrainConfig, where: Run) -> None:
        self._settings, self._where = settings, where
        self._run = RunDirectory(where.output)
        self._accelerator = make_accelerator(
            config, log_with=where.report_to, project_dir=str(where.output)
        )

    def __enter__(self) -> tuple[RunDirectory, Any]:
        where, accelerator = self._where, self._accelerator
        if accelerator.is_main_process:
            self._run.open(
                self._settings, resume=where.resume, overwrite=where.overwrite, free=_FREE
            )
        accelerator.wait_for_everyone()
        if where.report_to:
            flat = {k: v for k, v in self._settings["train"].items()}
            accelerator.init_trackers("tracking", config=flat)
        return self._run, accelerator

    def __exit__(self, *exc: object) -> None:
        self._run.close()
        self._accelerator.end_training()


def _encoded(
    pipe: Any, images: ImageSource, flip: bool, accelerator: Any, reporter: Reporter
) -> Latents:
    with accelerator.main_process_first():
        latents = encode_latents(
            images,
            pipe.vae.to(accelerator.device),
            size=image_size(pipe),
            device=accelerator.device,
            flip=flip,
            progress=lambda done, total: reporter.advance("encoding images", done, total),
        )
    if latents.skipped:
        reporter.say(f"skipped {latents.skipped} images that cannot be read")
    return latents


def _watch(
    where: Run,
    config: TrainConfig,
    reporter: Reporter,
    accelerator: Any,
    pipe: Callable[[], Any],
    images: ImageSource,
) -> Watch:
    def on_step(progress: Progress) -> None:
        note = f"loss {progress.loss:.4f}  {progress.samples_per_second:.0f} samples/s"
        reporter.advance("training", progress.step, config.steps, note)
        if where.report_to:
            values = {k: v for k, v in vars(progress).items() if k != "step"}
            accelerator.log(values, step=progress.step)

    def preview(step: int, model: Any) -> None:
        classes = list(range(min(16, max(1, len(images.classes)))))
        path = where.output / "previews" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        pictures = generate(pipe(), classes, list(range(len(classes))), Sampling(steps=20))
        Image.fromarray(grid(pictures)).save(path)

    return Watch(where.checkpoint_every, where.keep, on_step, preview, where.preview_every)


def _saver(
    pipe: Any, source: Source, schedule: Schedule, config: TrainConfig, output: Path
) -> Callable[[dict[str, Any]], None]:
    base = artifact.base_of(source.model, source.revision)

    def save(metrics: dict[str, Any]) -> None:
        with enable(pipe, schedule):
            artifact.save(
                pipe,
                output,
                base_model=base,
                revision=source.revision,
                training={"data": source.data, "flip": source.flip, **config.to_dict()},
                metrics=metrics,
            )

    return save


def _quality(
    images: ImageSource, size: int
) -> tuple[FeatureExtractor | None, Moments | None]:
    if images.name != "digits" or size != 32:
        return None, None
    features = extractor("digits")
    batches = (batch for _, batch in iter_images(images, size, 256))
    return features, reference_moments(batches, features)


def _write_samples(
    variants: list[Variant], classes: tuple[int, ...], how: Sampling, seed: int, path: Path
) -> None:
    """One row of images per variant, the same labels and seeds in every row."""
    labels = [classes[i % len(classes)] for i in range(10)]
    seeds = [seed + i for i in range(10)]
    pictures = []
    for variant in variants:
        with enable(variant.pipe, variant.schedule):
            pictures.append(generate(variant.pipe, labels, seeds, how))
    part = path.with_name(path.name + ".partial")
    Image.fromarray(grid(np.concatenate(pictures), columns=10)).save(part, format="png")
    part.replace(path)
