"""What the jobs share: settings of a run, opening model and data, the accelerator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from accelkit.artifact import artifact
from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.autoencoders import autoencoder_of
from accelkit.backbones.conditioning import Item, conditioning_of
from accelkit.backbones.watched import learn
from accelkit.data.latents import Latents, encode_latents
from accelkit.data.prompts import Prompts, encode_captions
from accelkit.data.sources import ImageSource, open_source
from accelkit.errors import AccelkitError
from accelkit.files.tensors import add_sums
from accelkit.files.writing import RESUME, writing
from accelkit.jobs.settings import Run, Source
from accelkit.runtime.switch import disable, enabled_on
from accelkit.sample.generate import Sampling, generate, grid
from accelkit.sample.many import together
from accelkit.train.config import TrainConfig
from accelkit.train.loop import Progress, Watch, make_accelerator
from accelkit.train.rundir import RunDirectory

MAY_DIFFER = frozenset({"evaluation"})
"""Settings of a run that its resumption may change: they do not touch the weights."""


class Reporter(Protocol):
    """Where a job tells what it does; the command line draws it."""

    def say(self, text: str) -> None:
        """Print a line."""

    def advance(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` parts of ``task`` are finished."""


class Silent:
    """A reporter of a process whose work another one tells of."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def advance(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show nothing."""


def open_model(source: Source) -> Any:
    """Return the pipeline a job works on, on the GPU if there is one; a tuned one is scheduled."""
    pipe = artifact.from_pretrained(
        source.model,
        revision=source.revision,
        variant=source.variant,
        vae=source.vae,
        num_heads=source.num_heads,
    )
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    learn(pipe)  # by its text encoders
    return pipe


def open_unscheduled(source: Source) -> Any:
    """Return what :func:`open_model` does, without a schedule."""
    pipe = open_model(source)
    if enabled_on(pipe) is not None:
        disable(pipe)
    return pipe


def open_images(source: Source, model: Any) -> ImageSource:
    """Return the data, refusing labels that the model lacks, or none of the captions it takes.

    Raises:
        AccelkitError: the data do not suit the model, or accelkit cannot call it.
    """
    known = backbone_of(model).num_classes
    images = open_data(source, known, "leave some out or give another model")
    if known is None and source.class_map:
        raise AccelkitError(f"this {type(model).__name__} takes no class; leave --class-map out")
    items_of(images, model)
    return images


def open_data(source: Source, known: int | None, remedy: str) -> ImageSource:
    """Return the data, refusing labels beyond the ``known`` ones of a model.

    Raises:
        AccelkitError: they cannot be read, or there are more classes, or higher labels; ``remedy``
            says what to do about the model.
    """
    images = open_source(source.data, skip_bad=source.skip_bad, class_map=source.class_map)
    if known is not None and len(images.classes) > known:
        raise AccelkitError(
            f"{source.data} has {len(images.classes)} classes, the model has {known}; {remedy}"
        )
    if known is not None and images.classes and images.class_labels[-1] >= known:
        raise AccelkitError(
            f"class {images.classes[-1]} of {source.data} has the label {images.class_labels[-1]}, "
            f"the model has {known} classes, 0 to {known - 1}; set another label by --class-map, "
            f"or {remedy}"
        )
    return images


def items_of(images: ImageSource, model: Any) -> tuple[Item, ...]:
    """Return what a model makes images of: the data's captions or classes, or None for neither.

    Raises:
        AccelkitError: the model is prompted by text and there are no captions, or it takes a class
            and there are none.
    """
    backbone = backbone_of(model)
    if conditioning_of(backbone).text:
        if images.captions is None:
            also = "".join(f" ({note})" for note in images.notes)
            raise AccelkitError(
                f"a {type(model).__name__} is prompted by text and {images.name} has no captions"
                f"{also}; put a metadata.jsonl (file_name and text a line) or a .txt for each "
                "image there"
            )
        return tuple(dict.fromkeys(images.captions))
    if backbone.num_classes is None or (images.labels is None and backbone.null_class is not None):
        return (None,)
    if images.labels is None:
        raise AccelkitError(
            f"this {type(model).__name__} takes a class with every image, {images.name} has none; "
            "put the images into a folder per class"
        )
    return images.class_labels


def image_size(pipe: Any) -> int:
    """Return height and width in pixels of a pipeline's images."""
    return conditioning_of(backbone_of(denoiser_of(pipe))).pixels(pipe)


@contextmanager
def claimed(
    settings: dict[str, Any], config: TrainConfig, where: Run
) -> Iterator[tuple[RunDirectory, Any]]:
    """Open the run's directory and its accelerator; close both whatever happens."""
    if where.report_to and where.report_to not in (known := _trackers()):
        raise AccelkitError(
            f"--report-to {where.report_to} is not installed or unknown; "
            f"installed: {', '.join(known) or 'none'}"
        )
    accelerator = make_accelerator(config, log_with=where.report_to, project_dir=str(where.output))
    run = RunDirectory(where.output)
    try:
        with together(accelerator.num_processes):
            if accelerator.is_main_process:
                run.open(settings, resume=where.resume, overwrite=where.overwrite, free=MAY_DIFFER)
            accelerator.wait_for_everyone()
            if where.report_to:
                accelerator.init_trackers("tracking", config=config.to_dict())
            yield run, accelerator
    except AccelkitError:
        if accelerator.is_main_process and not where.resume:
            run.abandon()  # so that the same command, corrected, can have the directory
        raise
    finally:
        run.close()
        for tracker in accelerator.trackers:  # and leave the processes together, for what follows
            tracker.finish()


def identify(run: RunDirectory, accelerator: Any, images: ImageSource, **others: str) -> None:
    """Record what a run is made of, whatever its settings call it, or compare it with the record.

    Args:
        run: open.
        accelerator: whose main process does it.
        images: the data.
        others: fingerprints of what else there is, by what it is.

    Raises:
        AccelkitError: the run began with other images or labels, or another of the others.
    """
    if not accelerator.is_main_process:
        return
    labels = b"" if images.labels is None else images.labels.tobytes()
    known = {"images": images.fingerprint, "labels": hashlib.sha256(labels).hexdigest()}
    run.identify(known | others)


def _trackers() -> list[str]:
    from accelerate.tracking import get_available_trackers

    return sorted(str(getattr(t, "value", t)) for t in get_available_trackers())


def encoded(
    pipe: Any, images: ImageSource, flip: bool, accelerator: Any, reporter: Reporter
) -> Latents:
    """Return the data's latents, computed by one process and read by all."""
    vae = autoencoder_of(pipe)
    conditioning = conditioning_of(backbone_of(denoiser_of(pipe)))
    with accelerator.main_process_first():
        latents = encode_latents(
            images,
            None if vae is None else vae.to(accelerator.device),
            size=image_size(pipe),
            device=accelerator.device,
            flip=flip,
            applied=conditioning.latent_settings,
            progress=lambda done, total: reporter.advance("encoding images", done, total),
        )
    if latents.skipped:
        reporter.say(f"skipped {latents.skipped} images that cannot be read")
    return latents


def announce(images: ImageSource, where: Run, accelerator: Any, reporter: Reporter) -> None:
    """Say what a run trains on as it begins; one that is resumed has said it."""
    if accelerator.is_main_process and not where.resume:
        reporter.say(f"training on {images.summary()}")


def prompted(
    pipe: Any, images: ImageSource, latents: Latents, accelerator: Any, reporter: Reporter
) -> Prompts | None:
    """Return the captions' embeddings, computed by one process; None for a model without text."""
    conditioning = conditioning_of(backbone_of(denoiser_of(pipe)))
    if not conditioning.text or images.captions is None:
        return None
    captions = [images.captions[place] for place in latents.places.tolist()]
    with accelerator.main_process_first():
        return encode_captions(
            captions,
            pipe,
            conditioning,
            progress=lambda done, total: reporter.advance("encoding captions", done, total),
        )


def watch(
    pipe: Any,
    items: Sequence[Item],
    config: TrainConfig,
    where: Run,
    accelerator: Any,
    reporter: Reporter,
) -> Watch:
    """Return what the loop calls back: progress, trackers and preview pictures."""

    def on_step(progress: Progress) -> None:
        note = f"loss {progress.loss:.4f}  {progress.samples_per_second:.0f} samples/s"
        reporter.advance("training", progress.step, config.steps, note)
        if where.report_to:
            values = {k: v for k, v in vars(progress).items() if k != "step"}
            accelerator.log(values, step=progress.step)

    def preview(step: int, model: Any) -> None:
        chosen = [items[i % len(items)] for i in range(16)]
        path = where.output / "previews" / f"step-{step:08d}.png"
        how = Sampling(steps=20)
        save_picture(grid(generate(pipe, chosen, list(range(16)), how)), path)

    return Watch(where.checkpoint_every, where.keep, on_step, preview, where.preview_every)


def save_picture(pixels: Any, path: Path, go_on: str = RESUME) -> None:
    """Write uint8 (H, W, 3) as a PNG; see :func:`accelkit.files.writing.writing`."""
    with writing(path, go_on, durable=False) as part:  # nothing reads it back
        Image.fromarray(pixels).save(part, format="png")


def save_pipeline(pipe: Any, path: Path, go_on: str = RESUME) -> None:
    """Write what diffusers' ``save_pretrained`` does, with checksums in the files of weights.

    Args:
        pipe: a pipeline, or a network alone.
        path: the directory, replaced if it is there.
        go_on: what to do if it cannot be written.
    """
    with writing(path, go_on) as part:
        pipe.save_pretrained(part)
        add_sums(part)
