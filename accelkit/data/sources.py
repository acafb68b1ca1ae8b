"""Images to train on and compare with: the digits, a folder, or a zip of one."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from accelkit.data import dataset_json
from accelkit.data.captions import Captions
from accelkit.data.class_map import ClassMap, read_class_map
from accelkit.data.classes import Classes, folder_classes, recorded_classes
from accelkit.data.digits import SIZE, digits
from accelkit.data.listing import Files, open_files
from accelkit.data.metadata import Label, Metadata, is_metadata, read_metadata
from accelkit.data.pictures import MOST_BYTES, SUFFIXES, UNREAD, crop_and_resize, decode
from accelkit.data.words import by_suffix, labelled, reason
from accelkit.errors import AccelkitError, AccelkitWarning, one_line


class ImageSource(ABC):
    """A set of images, with or without classes and captions.

    Attributes:
        name: the name that was given.
        labels: int64 of shape (n,), or None.
        classes: names of the classes in the order of their labels; empty without labels.
        class_labels: the label of each class, rising: 0, 1, … unless a file sets others.
        captioned: number of images that have a caption.
        notes: phrases about files that are there and not used.
        skip_bad: pass over images that cannot be read, and list them in ``skipped``.
        skipped: images that the last pass of :func:`iter_images` left out, each with the reason.
    """

    captioned = 0
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, classes: Classes | None, skip_bad: bool = False) -> None:
        self.name = name
        self.labels = classes.of_images if classes else None
        self.classes: tuple[str, ...] = classes.names if classes else ()
        self.class_labels: tuple[int, ...] = classes.labels if classes else ()
        self.skip_bad = skip_bad
        self.skipped: list[str] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def names(self) -> dict[int, str]:
        """The classes' names by label."""
        return dict(zip(self.class_labels, self.classes, strict=True))

    @property
    def captions(self) -> tuple[str, ...] | None:
        """A text for each image, or None if there are none.

        Raises:
            AccelkitError: only some images have one, or a caption cannot be read.
        """
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of names and contents, wherever the images are.

        Labels are part of it unless they follow from the names.
        """

    @abstractmethod
    def read(self, index: int, size: int) -> np.ndarray:
        """Return image ``index`` as RGB uint8 (size, size, 3), resized and cropped.

        Raises:
            AccelkitError: the image cannot be read.
        """

    def summary(self) -> str:
        """Return a phrase: the number of images, the label of each class, what was not used."""
        labels = f", labels {labelled(self.names)}" if self.classes else ", without classes"
        some = f"captions for {self.captioned:,}" if self.captioned < len(self) else "with captions"
        captions = f", {some}" if self.captioned else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return one_line(f"{len(self):,} images of {self.name}{labels}{captions}{notes}", 380)


def open_source(
    spec: str | Path, *, skip_bad: bool = False, class_map: str | Path | None = None
) -> ImageSource:
    """Return a set of images.

    Args:
        spec: ``digits``; a folder with a sub-folder per class (sorted names are labels 0, 1, ...);
            a folder of images without classes; or a zip of either, of which a path may name a part,
            as in ``cifar10.zip/train``. A single outermost folder of a zip is opened.
            Labels in a ``dataset.json`` of NVlabs' tools, or in the column ``label`` of a
            ``metadata.jsonl`` or ``metadata.csv``, take precedence over folders. Captions are in
            the column ``text`` of such a table (``file_name`` relative to it) or in a ``.txt`` next
            to each image; images with captions need no classes.
        skip_bad: pass over images that cannot be read instead of raising.
        class_map: file that sets the labels of the classes; see
            :func:`accelkit.data.class_map.read_class_map`.

    Raises:
        AccelkitError: the path does not exist or holds no images; the zip is broken or hostile;
            images are next to class folders, or a class folder holds none, or folders instead;
            labels or captions are malformed, missing for an image, or given twice; the class
            map does not suit the classes.
    """
    given = None if class_map is None else read_class_map(class_map)
    if str(spec) == "digits":
        return _Digits(given)
    return _Images(str(spec), open_files(Path(spec), _matters), skip_bad, given)


def iter_images(
    source: ImageSource, size: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield indices, int64 (n,), and images, uint8 (n, size, size, 3), in order.

    The indices of skipped images are missing.

    Raises:
        AccelkitError: an image cannot be read and is not to be skipped, or none can be read.
    """
    indices: list[int] = []
    images: list[np.ndarray] = []
    found = 0
    source.skipped.clear()
    for index in range(len(source)):
        try:
            images.append(source.read(index, size))
            indices.append(index)
        except AccelkitError as error:
            if not source.skip_bad:
                raise
            source.skipped.append(str(error))
        if len(images) == batch:
            yield np.array(indices), np.stack(images)
            found += len(images)
            indices, images = [], []
    if images:
        yield np.array(indices), np.stack(images)
    elif not found:
        raise AccelkitError(f"none of the {len(source)} images in {source.name} can be read")


class _Digits(ImageSource):
    def __init__(self, class_map: ClassMap | None) -> None:
        self._images, labels = digits()
        classes = Classes(tuple(map(str, range(10))), tuple(range(10)), labels)
        super().__init__("digits", classes.mapped(class_map, "digits") if class_map else classes)

    def __len__(self) -> int:
        return len(self._images)

    @cached_property
    def fingerprint(self) -> str:
        assert self.labels is not None
        return hashlib.sha256(self._images.tobytes() + self.labels.tobytes()).hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        image = self._images[index]
        return image if size == SIZE else crop_and_resize(Image.fromarray(image), size)


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in SUFFIXES


def _matters(path: PurePosixPath) -> bool:
    return _is_image(path) or is_metadata(path) or path.name == dataset_json.NAME


class _Images(ImageSource):
    def __init__(self, name: str, files: Files, skip_bad: bool, class_map: ClassMap | None) -> None:
        self._files = files
        self._names = sorted(filter(_is_image, files.paths))
        files.refuse_archives()
        if not self._names:
            found = f", found {by_suffix(files.paths)}" if files.paths else ""
            raise AccelkitError(
                f"no images in {files.where}; expected {', '.join(sorted(SUFFIXES))} files, "
                f"in a sub-folder per class or without any{found}"
            )
        self._refuse_unread_labels()
        metadata = read_metadata(files)
        self._refuse_rows_of_nothing(metadata)
        recorded = dataset_json.read_labels(files)
        self._captions = Captions(files, self._names, metadata.captions)
        classes = self._classified(metadata.labels, recorded, class_map)
        super().__init__(name, classes, skip_bad)
        self._recorded = classes is not None and classes.recorded
        self.captioned = len(self._captions)
        self.notes = self._passed_over(metadata, recorded)

    def _refuse_unread_labels(self) -> None:
        if found := self._files.next_to(self._names, ".cls"):  # an unpacked WebDataset
            raise AccelkitError(
                f"{self._files.where} has labels in files such as {min(found.values())}, which "
                'accelkit does not read; write them to metadata.jsonl, {"file_name": …, "label": '
                "…} a line, and remove those files"
            )

    def _refuse_rows_of_nothing(self, metadata: Metadata) -> None:
        rows = metadata.captions.keys() | metadata.labels.keys()
        if rows and rows.isdisjoint(self._names):
            raise AccelkitError(
                f"no row of metadata in {self._files.where} names an image there, the first is of "
                f"{min(rows)}; write each file_name relative to the table"
            )

    def _classified(
        self,
        rows: Mapping[PurePosixPath, Label],
        recorded: Mapping[PurePosixPath, int] | None,
        class_map: ClassMap | None,
    ) -> Classes | None:
        files, images = self._files, self._names
        if recorded and rows:
            raise AccelkitError(
                f"{files.where} has labels both in {dataset_json.NAME} and in metadata; remove "
                "one of them"
            )
        classes = None
        if labels := recorded or rows:
            classes = recorded_classes(files, images, labels)
        elif recorded is None:
            classes = folder_classes(files, images, self._captions)
        if class_map is None:
            if classes is not None:
                classes.warn(files.where)
            return classes
        if classes is None:
            raise AccelkitError(
                f"{files.where} has no classes that the class map {class_map.where} could label; "
                "leave it out, or put the images into a folder per class"
            )
        return classes.mapped(class_map, files.where)

    def _passed_over(
        self, metadata: Metadata, recorded: Mapping[PurePosixPath, int] | None
    ) -> tuple[str, ...]:
        """Return notes on files that are not used; warn of pictures, which change the data."""
        rest = [n for n in self._files.paths if not _is_image(n) and not is_metadata(n)]
        pictures = [n for n in rest if n.suffix.lower() in UNREAD]
        read = {*pictures, *self._captions.files}
        read |= {PurePosixPath(dataset_json.NAME)} if recorded is not None else set()
        others = [n for n in rest if n not in read]
        if pictures:
            warnings.warn(
                one_line(
                    f"passed over pictures in {self._files.where} whose format accelkit does not "
                    f"read: {len(pictures):,} ({by_suffix(pictures)}); convert them to .png, or "
                    "remove them"
                ),
                AccelkitWarning,
                stacklevel=4,
            )
        strangers = {*metadata.captions, *metadata.labels, *(recorded or {})} - set(self._names)
        columns = [name or "one without a name" for name in sorted(metadata.columns)]
        notes = [
            f"other files passed over: {len(others):,} ({by_suffix(others)})" if others else "",
            f"rows that name no image: {len(strangers):,}" if strangers else "",
            f"columns not read: {', '.join(columns)}" if columns else "",
        ]
        return tuple(filter(None, notes))

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def captions(self) -> tuple[str, ...] | None:
        """Captions from a metadata file, or from the ``.txt`` next to each image."""
        return self._captions.read() if self.captioned else None

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self._names:
            try:
                content = self._files.content(name, MOST_BYTES)
            except Exception as error:  # see Files.content
                if not self.skip_bad:
                    raise self._unreadable(name, error) from error
                content = b""
            digest.update(f"{name}\0".encode(errors="surrogateescape"))
            digest.update(hashlib.sha256(content).digest())
        if self.labels is None and all(len(name.parts) > 1 for name in self._names):
            digest.update(b"folders that are no classes")
        elif self.labels is not None and self._recorded:  # the names do not give these labels
            digest.update(repr((self.classes, self.labels.tolist())).encode())
        return digest.hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        name = self._names[index]
        try:
            return decode(self._files.content(name, MOST_BYTES), size)
        except Exception as error:  # Pillow's decoders raise many kinds too
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: PurePosixPath, error: Exception) -> AccelkitError:
        # Pillow's own message for an unknown format holds an address in memory
        known = not isinstance(error, UnidentifiedImageError)
        return AccelkitError(
            f"cannot read the image {self._files.where}/{name} "
            f"({reason(error) if known else 'not in a known format'}); "
            "remove it or use --skip-bad"
        )
