"""Samples images to files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from accelkit.backbones.conditioning import Item
from accelkit.errors import AccelkitError
from accelkit.files.locks import LOCK, alone_in
from accelkit.files.writing import AGAIN, PARTIAL, explain_failure, remove, write_json
from accelkit.jobs.inputs import open_model
from accelkit.jobs.outputs import save_picture
from accelkit.jobs.reporter import Reporter
from accelkit.jobs.settings import Source
from accelkit.runtime import graphs
from accelkit.runtime.switch import disable, enable, enabled_on
from accelkit.sample.generate import Sampling, check_seed, generate, grid
from accelkit.schedule import Schedule
from accelkit.subject import Subject

_MOST_CLASSES = 1_000_000  # a typing error should not fill the memory
_DIGITS = 9
GRID, INDEX = "grid.png", "samples.json"
_AGAIN = f"{AGAIN} with --overwrite"
_WRITTEN = re.compile(r"(\d{6,}-class\d+\.png|grid\.png|samples\.json)(\.partial)?")


def sample(
    source: Source,
    schedule: str | None,
    labels: str | None,
    number: int,
    seed: int,
    batch_size: int,
    how: Sampling,
    output: Path,
    overwrite: bool,
    kernels: str,
    mode: str | None,
    reporter: Reporter,
) -> list[Path]:
    """Write ``number`` PNG files, a grid and an index; return the files of the images.

    Args:
        schedule: the schedule to run. Default: the one that the model was tuned for, if any.
        labels: classes to cycle through, such as ``3,1,4`` or ``0-9``. Default: all classes that
            the model names.
        number: number of images; image i has seed ``seed + i``.
        seed: seed of the first image.
        overwrite: remove the files of an earlier run, and nothing else.
        kernels: as for :func:`accelkit.enable`.
        mode: as for :func:`accelkit.compile`, None for no graphs.

    Raises:
        AccelkitError: an input does not fit.
    """
    if number < 1 or batch_size < 1:
        raise AccelkitError(f"give at least 1 image and a batch of 1, got {number}, {batch_size}")
    check_seed(seed)
    _check_free(output, overwrite)
    subject = open_model(source)
    runs: str | Schedule | None = schedule
    if (tuned_for := enabled_on(subject)) is not None:
        runs = tuned_for.schedule if schedule is None else schedule
        disable(subject)
    if runs is not None:
        enable(subject, runs, kernels=kernels)
    if mode is not None:
        graphs.compile(subject, mode)
    how = how.check(subject)
    items = _items(subject, labels)
    with explain_failure(output, _AGAIN):
        output.mkdir(parents=True, exist_ok=True)
    images: list[np.ndarray] = []
    rows, files = [], []
    with alone_in(output, "another accelkit sample"):
        _check_free(output, overwrite)  # another run may have ended in the meantime
        for start in range(0, number, batch_size):
            places = range(start, min(start + batch_size, number))
            chosen = [items[i % len(items)] for i in places]
            batch = generate(subject, chosen, [seed + i for i in places], how)
            if not images:  # no input is refused from here on
                _clear(output)
            images.append(batch)
            for place, label, image in zip(places, chosen, batch, strict=True):
                files.append(output / f"{place:06d}{'' if label is None else f'-class{label}'}.png")
                save_picture(image, files[-1], _AGAIN)
                rows.append({"file": files[-1].name, "label": label, "seed": seed + place})
            reporter.advance("sampling", places.stop, number)
        save_picture(grid(np.concatenate(images)), output / GRID, _AGAIN)
        state = enabled_on(subject)
        about = {
            "model": source.model,
            "schedule": state and state.schedule.to_dict(),
            "sampling": vars(how),
            "images": rows,
        }
        write_json(output / INDEX, about, _AGAIN)
    return files


def _check_free(output: Path, overwrite: bool) -> None:
    """Raise AccelkitError for a directory that is not empty, unless it may be overwritten."""
    content = [e for e in output.iterdir() if e.name != LOCK] if output.is_dir() else []
    if (output.exists() and not output.is_dir()) or (content and not overwrite):
        raise AccelkitError(
            f"the output {output} is not an empty directory; use --overwrite or another -o"
        )


def _clear(output: Path) -> None:
    """Remove the files of an earlier run, which may have written more than this one will."""
    for entry in output.iterdir():
        if _WRITTEN.fullmatch(entry.name) and (entry.is_file() or entry.suffix == PARTIAL):
            remove(entry)


def parse_labels(text: str) -> list[int]:
    """Return the classes in a list such as ``"3,1,4"`` or ``"0-9"``."""
    labels: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise AccelkitError(f"cannot read the labels {text!r}; write e.g. 3,1,4 or 0-9")
        for number in (first, last or first):
            # int() refuses thousands of digits
            if len(number) > _DIGITS or int(number) >= _MOST_CLASSES:
                raise AccelkitError(f"no model has a class {number}, as the labels {text!r} ask")
        labels += range(int(first), int(last or first) + 1)
        if len(labels) > _MOST_CLASSES:
            raise AccelkitError(f"the labels {text!r} are more than {_MOST_CLASSES:,}; give fewer")
    if not labels:
        raise AccelkitError(f"the labels {text!r} name no class; write e.g. 3,1,4 or 0-9")
    return labels


def _items(subject: Subject, labels: str | None) -> Sequence[Item]:
    """Return the classes of ``labels``, or else those that the pipeline names, or else all."""
    kind, count = type(subject.model).__name__, subject.backbone.num_classes
    if subject.calls.text:
        raise AccelkitError(
            f"accelkit sample makes images of classes, a {kind} is prompted by text; open it with "
            "accelkit.from_pretrained and call it with your prompts"
        )
    if labels and count is None:
        raise AccelkitError(f"this {kind} has no classes; leave --labels out")
    if labels:
        return parse_labels(labels)
    named = sorted(set(getattr(subject.pipe, "labels", {}).values()))
    return named or ([None] if count is None else range(count))
