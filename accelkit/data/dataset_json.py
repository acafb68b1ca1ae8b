"""``dataset.json``, the labels next to images that NVlabs' dataset tools have written.

``{"labels": [["00000/img00000000.png", 6], …]}`` or ``{"labels": null}`` (Karras et al. 2020,
stylegan2-ada-pytorch's ``dataset_tool.py``; StyleGAN3's and EDM's are the same). The folders there
are shards of a thousand images and no classes.
"""

from __future__ import annotations

import reprlib
from pathlib import PurePosixPath
from typing import Any

from accelkit.data.files import Files
from accelkit.data.metadata import MOST_BYTES, located, whole_number
from accelkit.data.words import reason
from accelkit.errors import AccelkitError
from accelkit.files.documents import parse_json

NAME = "dataset.json"


def read_labels(files: Files) -> dict[PurePosixPath, int] | None:
    """Return the label of each file, none at all where a data set says that it has none.

    Returns:
        None without a ``dataset.json``, or where it is of something else and speaks of no labels.

    Raises:
        AccelkitError: it cannot be read, is not of the form, labels a file twice, or is in a
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
    try:
        content = parse_json(files.content(found[0], MOST_BYTES).decode("utf-8-sig"))
    except Exception as error:  # zipfile raises as many kinds as Pillow
        raise AccelkitError(
            f"cannot read {where} ({reason(error)}); correct or remove it"
        ) from error
    if not isinstance(content, dict) or "labels" not in content:
        return None
    rows = [] if content["labels"] is None else content["labels"]
    if not isinstance(rows, list) or (content["labels"] is not None and not rows):
        raise _strange(where, rows)
    labels: dict[PurePosixPath, int] = {}
    for row in rows:
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], str):
            raise _strange(where, row)
        name, label = located(PurePosixPath(), row[0]), _label(row[1])
        if label is None:
            raise _strange(where, row)
        if name in labels:
            raise AccelkitError(f"{where} labels {name} twice; remove one of the two")
        labels[name] = label
    return labels


def _label(value: Any) -> int | None:
    """Return the class that a number or a one-hot vector stands for, None for anything else."""
    if not isinstance(value, list):
        return whole_number(value)
    numbers = [whole_number(part) for part in value]
    return numbers.index(1) if sorted(numbers, key=str) == [0] * (len(value) - 1) + [1] else None


def _strange(where: str, value: Any) -> Exception:
    return AccelkitError(
        f"{where} holds {reprlib.repr(value)} where labels are expected as in "
        '{"labels": [["00000/img00000000.png", 6], …]}, whole numbers or one-hot; correct or '
        "remove it"
    )
