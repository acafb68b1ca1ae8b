"""A file that gives the classes of a data set their labels, the rows of a model's table."""

from __future__ import annotations

import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelkit.data.listing import read_file
from accelkit.data.metadata import whole_number
from accelkit.data.words import reason
from accelkit.errors import AccelkitError
from accelkit.files.documents import parse_json

_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ClassMap:
    """Labels by class name.

    Attributes:
        where: the file.
        labels: labels by name.
        of_model: whether the file lists the classes of a model, of which a data set may have some;
            otherwise it lists those of the data set.
    """

    where: str
    labels: dict[str, int]
    of_model: bool


def read_class_map(path: str | Path) -> ClassMap:
    """Return the content of a file: a JSON object, or a list of a model's classes in order.

    ``{"n01440764": 0, "n01443537": 1}`` names the data set's classes. Any other text has a name on
    each line, the first with the label 0, as ImageNet's lists of synsets do.

    Raises:
        AccelkitError: the file cannot be read, has another form, or names a class twice.
    """
    try:
        text = read_file(Path(path), _MOST_BYTES).decode("utf-8-sig")
        if Path(path).suffix.lower() != ".json" and not text.lstrip().startswith("{"):
            return _listed(str(path), text)
        content = parse_json(text)
    except (OSError, ValueError) as error:
        raise AccelkitError(
            f"cannot read the class map {path} ({reason(error)}); give a JSON object such as "
            '{"cat": 0, "dog": 1}, or a list of names, one a line'
        ) from error
    if not isinstance(content, dict) or not content:
        raise AccelkitError(
            f'the class map {path} is not a JSON object such as {{"cat": 0, "dog": 1}}; write the '
            "classes of the data and their labels in this form, or a list of names, one a line"
        )
    return ClassMap(str(path), {n: _label(path, n, v) for n, v in content.items()}, False)


def _label(path: str | Path, name: str, value: Any) -> int:
    label = whole_number(value)
    if label is None or isinstance(value, float):
        raise AccelkitError(
            f"the class map {path} has {reprlib.repr(value)} for {name}; a label is a whole "
            "number, 0 or more"
        )
    return label


def _listed(where: str, text: str) -> ClassMap:
    names = [line.strip() for line in text.rstrip().split("\n")]
    if "" in names:
        raise ValueError(f"line {names.index('') + 1} is empty")
    if len(set(names)) < len(names):
        raise ValueError(f"it holds {Counter(names).most_common(1)[0][0]!r} twice")
    return ClassMap(where, {name: label for label, name in enumerate(names)}, True)
