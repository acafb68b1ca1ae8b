"""``metadata.jsonl`` and ``metadata.csv``, as Hugging Face's imagefolder has them.

A row for each image: ``file_name``, relative to the file, and next to it ``text``, a caption,
``label``, a class by number or name, or both.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from accelkit.data.files import Files
from accelkit.data.words import reason
from accelkit.errors import AccelkitError
from accelkit.files.documents import parse_json

NAME, TEXT, LABEL = "file_name", "text", "label"
MOST_BYTES = 2**30
_MOST_LABEL = 2**31  # a label beyond it is none, and would not fit an int64 if long enough
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)|nan", re.IGNORECASE)

Label = int | str
Row = tuple[int, dict[str, Any]]


@dataclass
class Metadata:
    """What the rows of a data set say of its images.

    Attributes:
        captions, labels: by image; empty where no row has any.
        columns: names of columns that are not read.
    """

    captions: dict[PurePosixPath, str] = field(default_factory=dict)
    labels: dict[PurePosixPath, Label] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)

    def add(self, image: PurePosixPath, row: dict[str, Any]) -> None:
        """Add an image's row, whose values are checked."""
        if TEXT in row:
            self.captions[image] = row[TEXT]
        if LABEL in row:
            self.labels[image] = row[LABEL]
        self.columns |= row.keys() - {NAME, TEXT, LABEL}


def is_metadata(path: PurePosixPath) -> bool:
    """Whether a file has rows about images."""
    return path.name in _READERS


def read_metadata(files: Files) -> Metadata:
    """Return what all metadata files of a data set say.

    Raises:
        AccelkitError: a file cannot be read, a row is not of the form, some rows of a file lack a
            column that others have, or an image has two rows.
    """
    found = Metadata()
    origin: dict[PurePosixPath, str] = {}
    if binary := [path for path in files.paths if path.name == "metadata.parquet"]:
        raise AccelkitError(
            f"{files.where}/{binary[0]} may hold labels or captions, and accelkit reads "
            f"{' and '.join(_READERS)}; save it as one of them, or remove it"
        )
    for path in sorted(filter(is_metadata, files.paths)):
        where = f"{files.where}/{path}"
        for number, row in _rows(files, path, where):
            image = located(path.parent, row[NAME])
            if image in origin:
                raise AccelkitError(
                    f"{image} has two rows, {origin[image]} and line {number} of {where}; remove "
                    "one of them"
                )
            origin[image] = f"line {number} of {where}"
            found.add(image, row)
    return found


def located(folder: PurePosixPath, name: str) -> PurePosixPath:
    """Return the path that a file in ``folder`` names, written by whatever system."""
    return PurePosixPath(posixpath.normpath(folder / name.replace("\\", "/")))


def whole_number(value: Any) -> int | None:
    """Return a label, None for what is none: a boolean, text, a fraction, below 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value < _MOST_LABEL and value == int(value) else None


def repeated(names: Iterable[str]) -> str:
    """Return the name that is there most often."""
    return Counter(names).most_common(1)[0][0]


class _RowError(Exception):
    def __init__(self, number: int, why: object) -> None:
        super().__init__(number, why)
        self.number, self.why = number, why


def _rows(files: Files, path: PurePosixPath, where: str) -> list[Row]:
    """Return line numbers and checked rows of a file."""
    try:
        text = files.content(path, MOST_BYTES).decode("utf-8-sig")
    except Exception as error:  # zipfile raises as many kinds as Pillow
        raise AccelkitError(
            f"cannot read {where} ({reason(error)}); correct or remove it"
        ) from error
    try:
        rows = list(_READERS[path.name](text))
        for number, row in rows:
            _check_row(number, row)
        for name in (TEXT, LABEL):
            having = {name in row for _, row in rows}
            if len(having) == 2:
                raise _RowError(next(n for n, row in rows if name not in row), f"no {name}")
    except _RowError as error:
        raise AccelkitError(
            f'line {error.number} of {where} is not of the form {{"{NAME}": "a.png", "{TEXT}": '
            f'"a caption"}} or {{"{NAME}": "a.png", "{LABEL}": 3}}: {error.why}; correct it'
        ) from error
    return rows


def _jsonl(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                raise _RowError(number, error) from error


def _csv(text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        rows += ((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise _RowError(reader.line_num, error) from error
    if not rows:
        return
    (first, cells), *below = rows
    columns = [cell.strip() for cell in cells]
    if NAME not in columns:
        raise _RowError(first, _unnamed(columns[0]))
    if len(set(columns)) < len(columns):
        raise _RowError(first, "two columns of one name")
    for number, cells in below:
        if len(cells) != len(columns):
            raise _RowError(number, f"{len(cells)} cells under {len(columns)} columns")
        row: dict[str, Any] = dict(zip(columns, cells, strict=True))
        if LABEL in row:
            row[LABEL] = _number_or_name(row[LABEL].strip())
        yield number, row


def _number_or_name(cell: str) -> float | str:
    # all cells are text, numbers too, which a column with gaps has as 3.0
    return float(cell) if _NUMBER.fullmatch(cell) else cell


def _unnamed(columns: str) -> str:
    """Return why a first line, read as one column, does not name the files."""
    for separator, name in {";": "semicolons", "\t": "tabs", "|": "bars"}.items():
        if NAME in map(str.strip, columns.split(separator)):
            return f"its columns are separated by {name}, expected commas"
    return f"no column {NAME}"


_READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    "metadata.jsonl": _jsonl,
    "metadata.csv": _csv,
}


def _check_row(number: int, row: Any) -> None:
    """Refuse a row without a file's name, or with a caption or label of another type."""
    if not isinstance(row, dict):
        raise _RowError(number, "no object")
    if not isinstance(row.get(NAME), str) or not row[NAME]:
        raise _RowError(number, f"no {NAME}")
    if not isinstance(row.get(TEXT, ""), str):
        raise _RowError(number, f"its {TEXT} is {reprlib.repr(row[TEXT])}, which is no text")
    label = row.get(LABEL, 0)
    if not (isinstance(label, str) and label.strip()) and whole_number(label) is None:
        raise _RowError(
            number,
            f"its {LABEL} is {reprlib.repr(label)}, neither a whole number of 0 or more nor a name",
        )
    if LABEL in row and not isinstance(label, str):
        row[LABEL] = whole_number(label)
    for name in (NAME, TEXT, LABEL):
        _check_unicode(number, row.get(name))


def _check_unicode(number: int, value: Any) -> None:
    # JSON may name half a surrogate pair, which no tokenizer takes
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise _RowError(number, error) from error
