"""Captions of images: rows of a metadata file, or a ``.txt`` next to each image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from accelkit.data.listing import Files
from accelkit.errors import AccelkitError, AccelkitWarning, one_line

_MOST_BYTES = 2**20


class Captions:
    """The captions of a data set's images; ``.txt`` files are read when the text is asked for.

    Args:
        files: files of the data set.
        images: images that have captions, or should have.
        rows: captions by image from metadata, which take precedence over a ``.txt``.

    Attributes:
        files: the ``.txt`` files that belong to an image.
    """

    def __init__(
        self,
        files: Files,
        images: Sequence[PurePosixPath],
        rows: Mapping[PurePosixPath, str],
    ) -> None:
        self._files, self._images, self._rows = files, images, rows
        texts = self._texts = files.next_to(images, ".txt")
        self._bare = [
            image
            for image in images
            if image not in rows and not (texts and image.with_suffix("") in texts)
        ]
        self.files = set(self._texts.values())

    def __len__(self) -> int:
        """Return the number of images that have a caption."""
        return len(self._images) - len(self._bare)

    def check(self) -> None:
        """Raise AccelkitError if an image has no caption."""
        where, images = self._files.where, self._images
        if bare := self._bare:
            strange = sorted(map(str, self._rows.keys() - set(images)))
            also = f" (a row names {strange[0]}, which is not an image there)" if strange else ""
            raise AccelkitError(
                f"{len(bare)} of {len(images)} images in {where} have no caption, e.g. {bare[0]}"
                f"{also}; give each a line in metadata.jsonl or a .txt next to it"
            )

    def read(self) -> tuple[str, ...]:
        """Return the caption of each image; warn of empty ones.

        Raises:
            AccelkitError: an image has no caption, or captions cannot be read.
        """
        self.check()
        where, images = self._files.where, self._images
        found = tuple(map(self._caption, images))
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

    def _caption(self, image: PurePosixPath) -> str:
        if image in self._rows:
            return self._rows[image]
        return self._files.text(self._texts[image.with_suffix("")], _MOST_BYTES).strip()
