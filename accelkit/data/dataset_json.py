"""``dataset.json``, the labels that NVlabs' dataset tools write next to images.

``{"labels": [["00000/img00000000.png", 6], …]}`` or ``{"labels": null}`` (Karras et al. 2020,
stylegan2-ada-pytorch's ``dataset_tool.py``; StyleGAN3's and EDM's are the same). The folders of
such a data set are shards of a thousand images, not classes.
"""

from __future__ import annotations

import reprlib
from pathlib import PurePosixPath
from typing import Any

from accelkit.data.listing import Files
from accelkit.data.metadata import MOST_BYTES, located, whole_number
from accelkit.errors import AccelkitError
from accelkit.files.documents import parse_json

NAME = "dataset.json"


def read_labels(files: Files) -> dict[PurePosixPath, int] | None:
    """Return the label of each file; an empty dict if the data set is said to have no labels.

    Returns:
        None without a ``dataset.json``, or if it has no entry ``labels``.

    Raises:
        AccelkitError: the file cannot be read, has another form, labels an image twice, or is in a
            folder, which then is a data set of its own.
    """
    found = sorted(path for path in files.paths if path.name == NAME)
    if not found:
        return None
    if (folder := found[0].parent) != PurePosixPath():
        raise AccelkitError(
            f"{files.where}/{folder} has labels of its own, in {NAME}; name it as the data, as in "
            f"{files.where}/{folder}"
        )
    where = f"{files.where}/{NAME}"
    text = files.text(found[0], MOST_BYTES)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise files.unreadable(found[0], error) from error
    if not isinstance(content, dict) or "labels" not in content:
        return None
    rows = content["labels"]
    if rows is None:
        return {}
    if not isinstance(rows, list) or not rows:
        raise _unexpected(where, rows)
    labels: dict[PurePosixPath, int] = {}
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
            raise _unexpected(where, row)
        name, label = located(PurePosixPath(), row[0]), _label(row[1])
        if label is None:
            raise _unexpected(where, row)
        if name in labels:
            raise AccelkitError(f"{where} labels {name} twice; remove one of the two")
        labels[name] = label
    return labels


def _label(value: Any) -> int | None:
    """Return the class that a number or a one-hot vector denotes, None for anything else."""
    if not isinstance(value, list):
        return whole_number(value)
    numbers = [whole_number(part) for part in value]
    return numbers.index(1) if sorted(numbers, key=str) == [0] * (len(value) - 1) + [1] else None


def _unexpected(where: str, value: Any) -> AccelkitError:
    return AccelkitError(
        f"{where} holds {reprlib.repr(value)} where labels are expected as in "
        '{"labels": [["00000/img00000000.png", 6], …]}, whole numbers or one-hot; correct or '
        "remove it"
    )
