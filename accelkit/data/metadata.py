"""``metadata.jsonl`` and ``metadata.csv``, in the form of Hugging Face's imagefolder.

Each row describes an image: ``file_name``, relative to the file, with ``text``, a caption,
``label``, a class by number or name, or both.
"""

from __future__ import annotations

import csv
import io
import posixpath
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from accelkit.data.listing import Files
from accelkit.errors import AccelkitError
from accelkit.files.documents import parse_json

NAME, TEXT, LABEL = "file_name", "text", "label"
MOST_BYTES = 2**30
_MOST_LABEL = 2**31  # a larger number is not a label, and might not fit an int64
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)|nan", re.IGNORECASE)

Label = int | str
Row = tuple[int, dict[str, Any]]


@dataclass
class Metadata:
    """The rows of a data set.

    Attributes:
        captions, labels: by image; empty if no row has any.
        columns: names of columns that are not read.
    """

    captions: dict[PurePosixPath, str] = field(default_factory=dict)
    labels: dict[PurePosixPath, Label] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)


def is_metadata(path: PurePosixPath) -> bool:
    """Return whether a file is a metadata file."""
    return path.name in _READERS


def read_metadata(files: Files) -> Metadata:
    """Return the rows of all metadata files of a data set.

    Raises:
        AccelkitError: a file cannot be read, a row has another form, some rows of a file lack a
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
            if TEXT in row:
                found.captions[image] = row[TEXT]
            if LABEL in row:
                found.labels[image] = row[LABEL]
            found.columns |= row.keys() - {NAME, TEXT, LABEL}
    return found


def located(folder: PurePosixPath, name: str) -> PurePosixPath:
    """Return the path that a file in ``folder`` names, on whichever system it was written."""
    return PurePosixPath(posixpath.normpath(folder / name.replace("\\", "/")))


def whole_number(value: Any) -> int | None:
    """Return a label, or None for a boolean, text, a fraction or a number below 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value < _MOST_LABEL and value == int(value) else None


class _RowError(Exception):
    def __init__(self, number: int, why: object) -> None:
        super().__init__(number, why)
        self.number, self.why = number, why


def _rows(files: Files, path: PurePosixPath, where: str) -> list[Row]:
    """Return line numbers and checked rows of a file."""
    text = files.text(path, MOST_BYTES)
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
            label = row[LABEL].strip()
            # all cells are text, and a column of numbers with gaps is often saved as 3.0
            row[LABEL] = float(label) if _NUMBER.fullmatch(label) else label
        yield number, row


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
    """Refuse a row without a file name, or with a caption or label of another type."""
    if not isinstance(row, dict):
        raise _RowError(number, "not an object")
    if not isinstance(row.get(NAME), str) or not row[NAME]:
        raise _RowError(number, f"no {NAME}")
    if not isinstance(row.get(TEXT, ""), str):
        raise _RowError(number, f"its {TEXT} is {reprlib.repr(row[TEXT])}, expected text")
    label = row.get(LABEL, 0)
    if not (isinstance(label, str) and label.strip()) and whole_number(label) is None:
        raise _RowError(
            number,
            f"its {LABEL} is {reprlib.repr(label)}, neither a whole number of 0 or more nor a name",
        )
    if LABEL in row and not isinstance(label, str):
        row[LABEL] = whole_number(label)
    for name in (NAME, TEXT, LABEL):
        try:
            str(row.get(name)).encode()
        except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair
            raise _RowError(number, error) from error
