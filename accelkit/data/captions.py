"""Captions that lie beside images: ``metadata.jsonl``, or a ``.txt`` for each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol

from accelkit.errors import AccelkitError

METADATA = "metadata.jsonl"
"""As Hugging Face's imagefolder has them: a line {"file_name": …, "text": …} for an image."""


class Files(Protocol):
    """Where captions lie: ``texts`` are the paths that :func:`is_text` holds for."""

    where: str
    texts: set[PurePosixPath]

    def content(self, name: PurePosixPath) -> bytes:
        """Return a file's bytes."""


def is_text(path: PurePosixPath) -> bool:
    """Whether a path may hold captions."""
    unseen = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return (path.suffix == ".txt" or path.name == METADATA) and not unseen


def captioned(files: Files, images: Sequence[PurePosixPath]) -> bool:
    """Whether any file holds captions of ``images``."""
    return any(t.name == METADATA for t in files.texts) or any(
        name.with_suffix(".txt") in files.texts for name in images
    )


def read_captions(files: Files, images: Sequence[PurePosixPath]) -> tuple[str, ...]:
    """Return the caption of each image.

    Paths in a ``metadata.jsonl`` are relative to it, and it goes before a ``.txt``.

    Raises:
        AccelkitError: an image has no caption, or captions cannot be read.
    """
    found: dict[PurePosixPath, str] = {}
    for name in images:
        if (beside := name.with_suffix(".txt")) in files.texts:
            found[name] = _text(files, beside).strip()
    for text in sorted(t for t in files.texts if t.name == METADATA):
        found |= _lines(files, text)
    if missing := [str(name) for name in images if name not in found]:
        strange = sorted(str(name) for name in found.keys() - set(images))
        also = f" ({METADATA} names {strange[0]}, which is no image there)" if strange else ""
        raise AccelkitError(
            f"{len(missing)} of {len(images)} images in {files.where} have no caption, e.g. "
            f"{missing[0]}{also}; give each a line in {METADATA} or a .txt beside it"
        )
    return tuple(found[name] for name in images)


def _lines(files: Files, path: PurePosixPath) -> dict[PurePosixPath, str]:
    captions = {}
    for number, line in enumerate(_text(files, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions[path.parent / row["file_name"]] = str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise AccelkitError(
                f"line {number} of {files.where}/{path} is not of the form "
                '{"file_name": "a.png", "text": "a caption"}'
            ) from error
    return captions


def _text(files: Files, path: PurePosixPath) -> str:
    try:
        return files.content(path).decode("utf-8-sig")
    except Exception as error:  # zipfile raises as many kinds as Pillow
        raise AccelkitError(f"cannot read the captions {files.where}/{path}: {error}") from error
