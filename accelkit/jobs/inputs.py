"""The model and the data of a job, opened and prepared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from accelkit.artifact.artifact import open_named
from accelkit.artifact.names import Named, named
from accelkit.backbones.autoencoders import autoencoder_of
from accelkit.backbones.conditioning import Item
from accelkit.data.latents import Latents, encode_latents
from accelkit.data.prompts import Prompts, encode_captions
from accelkit.data.sources import ImageSource, open_source
from accelkit.errors import AccelkitError
from accelkit.jobs.reporter import Reporter
from accelkit.jobs.settings import Source
from accelkit.runtime.switch import disable, enabled_on
from accelkit.subject import Subject


def origin_of(source: Source, found: Named) -> Source:
    """Return ``source`` with the base model in place of an artifact."""
    return replace(source, **found.base)


def open_model(source: Source, found: Named | None = None) -> Subject:
    """Return the model of a job, on the GPU if there is one; a tuned model has its schedule."""
    found = found or named(source.model, source.revision)
    subject = open_named(found, source.variant, source.vae, source.num_heads)
    subject.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return subject.learn()


def open_unscheduled(source: Source, found: Named | None = None) -> Subject:
    """Return the model of :func:`open_model` without a schedule."""
    subject = open_model(source, found)
    if enabled_on(subject) is not None:
        disable(subject)
    return subject


def open_images(source: Source, subject: Subject) -> ImageSource:
    """Return the data of a job, checked against its model.

    Raises:
        AccelkitError: the model lacks a label or the data lack captions, or accelkit does not know
            how to call the model.
    """
    known = subject.backbone.num_classes
    images = open_data(source, known, "leave some out or give another model")
    if known is None and source.class_map:
        kind = type(subject.model).__name__
        raise AccelkitError(f"this {kind} takes no class; leave --class-map out")
    items_of(images, subject)
    return images


def open_data(source: Source, known: int | None, remedy: str) -> ImageSource:
    """Return the data of a job for a model of ``known`` classes, None for any number.

    Raises:
        AccelkitError: the data cannot be read, or have more classes or higher labels; ``remedy``
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


def items_of(images: ImageSource, subject: Subject) -> tuple[Item, ...]:
    """Return the captions or classes that a model makes images of; (None,) if it takes neither.

    Raises:
        AccelkitError: the model needs captions or classes, and the data have none.
    """
    kind, backbone = type(subject.model).__name__, subject.backbone
    if subject.calls.text:
        if images.captions is None:
            also = "".join(f" ({note})" for note in images.notes)
            raise AccelkitError(
                f"a {kind} is prompted by text and {images.name} has no captions{also}; put a "
                "metadata.jsonl (file_name and text a line) or a .txt for each image there"
            )
        return tuple(dict.fromkeys(images.captions))
    if backbone.num_classes is None or (images.labels is None and backbone.null_class is not None):
        return (None,)
    if images.labels is None:
        raise AccelkitError(
            f"this {kind} takes a class with every image, {images.name} has none; put the images "
            "into a folder per class"
        )
    return images.class_labels


def encoded(
    subject: Subject, images: ImageSource, flip: bool, accelerator: Any, reporter: Reporter
) -> Latents:
    """Return the data's latents, computed by one process and read by all."""
    vae = autoencoder_of(subject.pipe)
    with accelerator.main_process_first():
        latents = encode_latents(
            images,
            None if vae is None else vae.to(accelerator.device),
            size=subject.calls.pixels(subject.pipe),
            device=accelerator.device,
            flip=flip,
            applied=subject.calls.latent_settings,
            progress=lambda done, total: reporter.advance("encoding images", done, total),
        )
    if latents.skipped:
        reporter.say(f"skipped {latents.skipped} images that cannot be read")
    return latents


def prompted(
    subject: Subject, images: ImageSource, latents: Latents, accelerator: Any, reporter: Reporter
) -> Prompts | None:
    """Return the captions' embeddings, computed by one process; None for a model without text."""
    if not subject.calls.text or images.captions is None:
        return None
    captions = [images.captions[place] for place in latents.places.tolist()]
    with accelerator.main_process_first():
        return encode_captions(
            captions,
            subject.pipe,
            subject.calls,
            progress=lambda done, total: reporter.advance("encoding captions", done, total),
        )
