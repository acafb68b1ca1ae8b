"""Sample images to files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.conditioning import Item, conditioning_of
from accelkit.errors import AccelkitError
from accelkit.files.locks import LOCK, alone_in
from accelkit.files.writing import AGAIN, PARTIAL, explain_failure, remove, write_json
from accelkit.jobs.common import Reporter, Source, open_model, save_picture
from accelkit.runtime import graphs
from accelkit.runtime.switch import disable, enable, enabled_on
from accelkit.sample.generate import Sampling, check_seed, generate, grid
from accelkit.schedule import Schedule

_MOST_CLASSES = 1_000_000  # a slip of the finger should not fill the memory
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
        source: which model.
        schedule: runs instead of the one the model was tuned for, if any.
        labels: classes to go round, such as ``3,1,4`` or ``0-9``; None for all the model names.
        number: how many images; image i has seed ``seed + i``.
        seed: of the first image.
        batch_size: images per batch.
        how: sampler, steps and guidance.
        output: directory.
        overwrite: remove what an earlier run left there, and nothing else.
        kernels: as :func:`accelkit.enable` takes it.
        mode: as :func:`accelkit.compile` takes it, None for no graphs.
        reporter: told how far it is.

    Raises:
        AccelkitError: any input that does not fit.
    """
    if number < 1 or batch_size < 1:
        raise AccelkitError(f"give at least 1 image and a batch of 1, got {number}, {batch_size}")
    check_seed(seed)
    _check_free(output, overwrite)
    pipe = open_model(source)
    runs: str | Schedule | None = schedule
    if (tuned_for := enabled_on(pipe)) is not None:
        runs = tuned_for.schedule if schedule is None else schedule
        disable(pipe)
    if runs is not None:
        enable(pipe, runs, kernels=kernels)
    if mode is not None:
        graphs.compile(pipe, mode)
    how = how.check(pipe)
    items = _items(pipe, labels)
    with explain_failure(output, _AGAIN):
        output.mkdir(parents=True, exist_ok=True)
    images: list[np.ndarray] = []
    rows, files = [], []
    with alone_in(output, "another accelkit sample"):
        _check_free(output, overwrite)  # another may have come and gone since
        for start in range(0, number, batch_size):
            places = range(start, min(start + batch_size, number))
            chosen = [items[i % len(items)] for i in places]
            batch = generate(pipe, chosen, [seed + i for i in places], how)
            if not images:  # nothing of the input is refused from here on
                _clear(output)
            images.append(batch)
            for place, label, image in zip(places, chosen, batch, strict=True):
                files.append(output / f"{place:06d}{'' if label is None else f'-class{label}'}.png")
                save_picture(image, files[-1], _AGAIN)
                rows.append({"file": files[-1].name, "label": label, "seed": seed + place})
            reporter.advance("sampling", places.stop, number)
        save_picture(grid(np.concatenate(images)), output / GRID, _AGAIN)
        state = enabled_on(pipe)
        about = {
            "model": source.model,
            "schedule": state and state.schedule.to_dict(),
            "sampling": vars(how),
            "images": rows,
        }
        write_json(output / INDEX, about, _AGAIN)
    return files


def _check_free(output: Path, overwrite: bool) -> None:
    """Raise AccelkitError for a place that holds something, unless it may be overwritten."""
    content = [e for e in output.iterdir() if e.name != LOCK] if output.is_dir() else []
    if (output.exists() and not output.is_dir()) or (content and not overwrite):
        raise AccelkitError(
            f"the output {output} is not an empty directory; use --overwrite or another -o"
        )


def _clear(output: Path) -> None:
    """Remove the files that a run writes, of which an earlier one may have written more."""
    for entry in output.iterdir():
        if _WRITTEN.fullmatch(entry.name) and (entry.is_file() or entry.suffix == PARTIAL):
            remove(entry)


def parse_labels(text: str) -> list[int]:
    """Return the classes that ``"3,1,4"`` or ``"0-9"`` means."""
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


def known_labels(pipe: Any) -> Sequence[Item]:
    """Return the classes a pipeline has names for, or all that its model has; None for none."""
    named = sorted(set(getattr(pipe, "labels", {}).values()))
    count = backbone_of(denoiser_of(pipe)).num_classes
    return named or ([None] if count is None else range(count))


def _items(pipe: Any, labels: str | None) -> Sequence[Item]:
    model = denoiser_of(pipe)
    backbone = backbone_of(model)
    if conditioning_of(backbone).text:
        raise AccelkitError(
            f"accelkit sample makes images of classes, a {type(model).__name__} is prompted by "
            "text; open it with accelkit.from_pretrained and call it with your prompts"
        )
    if labels and backbone.num_classes is None:
        raise AccelkitError(f"this {type(model).__name__} has no classes; leave --labels out")
    return parse_labels(labels) if labels else known_labels(pipe)
