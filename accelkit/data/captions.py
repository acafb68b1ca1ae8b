"""Captions next to images: rows of a metadata file, or a ``.txt`` for each image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import PurePosixPath

from accelkit.data.files import Files, next_to
from accelkit.data.words import one_line, reason, refusal
from accelkit.errors import AccelkitWarning

_MOST_BYTES = 2**20


class Captions:
    """The captions of a data set's images, of which ``.txt`` files are read when asked for.

    Args:
        files: of the data set.
        images: those that have captions, or should have.
        rows: captions by image from metadata, which take precedence over a ``.txt``.

    Attributes:
        files: the ``.txt`` that belong to an image.
    """

    def __init__(
        self,
        files: Files,
        images: Sequence[PurePosixPath],
        rows: Mapping[PurePosixPath, str],
    ) -> None:
        self._files, self._images, self._rows = files, images, rows
        self._texts = next_to(images, files, ".txt")
        self.files = set(self._texts.values())

    def __len__(self) -> int:
        """How many images have a caption."""
        return len(self._images) - len(self._bare) if self._rows or self._texts else 0

    @cached_property
    def _bare(self) -> list[PurePosixPath]:
        rows, texts = self._rows, self._texts
        return [i for i in self._images if i not in rows and i.with_suffix("") not in texts]

    def check(self) -> None:
        """Raise AccelkitError if an image has no caption."""
        where, images = self._files.where, self._images
        if bare := self._bare:
            strange = sorted(map(str, self._rows.keys() - set(images)))
            also = f" (a row names {strange[0]}, which is no image there)" if strange else ""
            raise refusal(
                f"{len(bare)} of {len(images)} images in {where} have no caption, e.g. {bare[0]}"
                f"{also}; give each a line in metadata.jsonl or a .txt beside it"
            )

    def read(self) -> tuple[str, ...]:
        """Return the caption of each image; empty ones warn.

        Raises:
            AccelkitError: an image has no caption, or captions cannot be read.
        """
        self.check()
        where, images = self._files.where, self._images
        found = tuple(self._rows[i] if i in self._rows else self._text(i) for i in images)
        if empty := [i for i, text in zip(images, found, strict=True) if not text.strip()]:
            warnings.warn(
                one_line(
                    f"{len(empty)} of {len(images)} images in {where} have an empty caption, e.g. "
                    f"{empty[0]}; they train the model as images without a prompt do"
                ),
                AccelkitWarning,
                stacklevel=3,
            )
        return found

    def _text(self, image: PurePosixPath) -> str:
        path = self._texts[image.with_suffix("")]
        try:
            return self._files.content(path, _MOST_BYTES).decode("utf-8-sig").strip()
        except Exception as error:  # zipfile raises as many kinds as Pillow
            raise refusal(
                f"cannot read the captions {self._files.where}/{path}: {reason(error)}"
            ) from error
