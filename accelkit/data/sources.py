"""Images to train on and compare with: the digits, a folder, or a zip of one."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from accelkit.data.captions import captioned, is_text, read_captions
from accelkit.data.digits import SIZE, digits
from accelkit.errors import AccelkitError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


class ImageSource(ABC):
    """A set of images, labelled by class or not, captioned or not.

    Attributes:
        name: what was asked for.
        labels: int64 of shape (n,), or None.
        classes: names of the classes, the label being the place; empty without labels.
        skip_bad: pass over images that cannot be read, and list them in ``skipped``.
        skipped: what the last pass of :func:`iter_images` left out, each with its reason.
    """

    name: str
    labels: np.ndarray | None
    classes: tuple[str, ...]
    skip_bad = False
    skipped: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def captions(self) -> tuple[str, ...] | None:
        """A text for each image, None if there are none.

        Raises:
            AccelkitError: some images have one and others don't, or they cannot be read.
        """
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over names and contents, the same wherever the images lie."""

    @abstractmethod
    def read(self, index: int, size: int) -> np.ndarray:
        """Return image ``index`` as RGB uint8 (size, size, 3), resized and cropped.

        Raises:
            AccelkitError: the image cannot be read; it is named.
        """


def open_source(spec: str | Path, *, skip_bad: bool = False) -> ImageSource:
    """Return the images that ``spec`` names.

    Args:
        spec: ``digits``; a folder with a sub-folder per class (sorted names are labels 0, 1, ...);
            a folder of images without classes; or a zip of either, of which a path may name a part,
            as in ``cifar10.zip/train``. A single outermost folder of a zip is looked through.
            Captions lie in ``metadata.jsonl`` (``file_name`` and ``text`` a line, paths relative
            to it) or in a ``.txt`` beside each image; images with captions need no classes.
        skip_bad: pass over images that cannot be read instead of raising.

    Raises:
        AccelkitError: nothing is there, there are no images, the zip is broken, images lie beside
            class folders, a class folder holds none, or it holds folders in their place.
    """
    if str(spec) == "digits":
        return _Digits()
    path = Path(spec)
    archive = next((p for p in (path, *path.parents) if p.suffix == ".zip" and p.is_file()), None)
    files: _Files
    if archive is not None:
        files = _Zip(archive, path.relative_to(archive).as_posix())
    elif path.is_dir():
        files = _Folder(path)
    else:
        raise AccelkitError(f"no data at {path}; give digits, a folder of images or a zip of one")
    return _Images(str(spec), files, skip_bad)


def iter_images(
    source: ImageSource, size: int, batch: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield indices, int64 (n,), and images, uint8 (n, size, size, 3), in order.

    Where bad images are skipped their indices are missing.

    Raises:
        AccelkitError: an image cannot be read and is not to be skipped, or none can.
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


def crop_and_resize(image: Image.Image, size: int) -> np.ndarray:
    """Return RGB uint8 (size, size, 3): shorter side resized to ``size``, centre cropped.

    As in ADM (Dhariwal and Nichol 2021) and DiT: halved by averaging while twice too large, then
    bicubic. Transparency is dropped and EXIF orientation ignored, as there; grey of 16 bits is
    scaled to 8.
    """
    if image.mode.startswith("I"):  # which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    wide, high = round(image.width * scale), round(image.height * scale)
    if (wide, high) != image.size:
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


class _Digits(ImageSource):
    name = "digits"

    def __init__(self) -> None:
        self._images, self.labels = digits()
        self.classes = tuple(str(i) for i in range(10))
        self.skipped = []

    def __len__(self) -> int:
        return len(self._images)

    @cached_property
    def fingerprint(self) -> str:
        assert self.labels is not None
        return hashlib.sha256(self._images.tobytes() + self.labels.tobytes()).hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        image = self._images[index]
        return image if size == SIZE else crop_and_resize(Image.fromarray(image), size)


def _is_seen(path: PurePosixPath) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _is_image(path: PurePosixPath) -> bool:
    return path.suffix.lower() in SUFFIXES and _is_seen(path)


class _Files(ABC):
    """Named images and what may tell of them, wherever they lie, and the outermost folders."""

    where: str
    names: list[PurePosixPath]
    texts: set[PurePosixPath]
    folders: set[str]

    @abstractmethod
    def content(self, name: PurePosixPath) -> bytes:
        """Return a file's bytes."""


class _Folder(_Files):
    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path
        found = (Path(top) / f for top, _, files in os.walk(path, followlinks=True) for f in files)
        names = [PurePosixPath(p.relative_to(path).as_posix()) for p in found]
        self.names = [n for n in names if _is_image(n)]
        self.texts = {n for n in names if is_text(n)}
        self.folders = {
            p.name for p in path.iterdir() if p.is_dir() and _is_seen(PurePosixPath(p.name))
        }

    def content(self, name: PurePosixPath) -> bytes:
        return (self._path / name).read_bytes()


class _Zip(_Files):
    def __init__(self, path: Path, part: str) -> None:
        self.where = str(path) if part == "." else f"{path}/{part}"
        self._path = path
        self._open: tuple[int, zipfile.ZipFile] | None = None
        try:
            members = self._archive().namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise AccelkitError(f"cannot read the zip {path}: {error}") from error
        self._prefix = PurePosixPath(part)
        # paths leave out a leading "./", by which the archive would not find the file again
        self._members = {PurePosixPath(m): m for m in members}
        self._list()
        if part == "." and len(self.folders) == 1 and all(len(n.parts) > 1 for n in self.names):
            self._prefix = PurePosixPath(*self.folders)
            self.where = f"{path}/{self._prefix}"
            self._list()

    def _list(self) -> None:
        inside = [m for m in self._members if m.is_relative_to(self._prefix)]
        below = [(m.relative_to(self._prefix), self._members[m].endswith("/")) for m in inside]
        self.names = [n for n, is_folder in below if _is_image(n) and not is_folder]
        self.texts = {n for n, is_folder in below if is_text(n) and not is_folder}
        self.folders = {
            n.parts[0]
            for n, is_folder in below
            if len(n.parts) > (0 if is_folder else 1) and _is_seen(n)
        }

    def _archive(self) -> zipfile.ZipFile:
        # a handle shared with a forked process would share its position in the file
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self._path))
        return self._open[1]

    def content(self, name: PurePosixPath) -> bytes:
        return self._archive().read(self._members[self._prefix / name])


class _Images(ImageSource):
    def __init__(self, name: str, files: _Files, skip_bad: bool) -> None:
        self.name, self.skip_bad, self.skipped = name, skip_bad, []
        self._files = files
        self._names = sorted(files.names)
        if not self._names:
            raise AccelkitError(
                f"no images in {files.where}; expected {', '.join(sorted(SUFFIXES))} files, "
                "in a sub-folder per class or without any"
            )
        loose = [n for n in self._names if len(n.parts) == 1]
        self.classes = tuple(sorted({n.parts[0] for n in self._names if len(n.parts) > 1}))
        self._captioned = captioned(files, self._names)
        if loose and self._captioned:
            self.classes = ()
        if loose and self.classes:
            raise AccelkitError(
                f"{files.where} holds images ({loose[0]}, …) beside class folders "
                f"({self.classes[0]}, …); put every image into a class, or remove the folders"
            )
        if self.classes:
            self._check_classes()
        places = {c: i for i, c in enumerate(self.classes)}
        self.labels = (
            np.array([places[n.parts[0]] for n in self._names], dtype=np.int64)
            if self.classes
            else None
        )

    def _check_classes(self) -> None:
        where = self._files.where
        if empty := sorted(self._files.folders - set(self.classes)):
            raise AccelkitError(
                f"{where}/{empty[0]} holds no images, and without it the classes after it would "
                "have other labels; put images in, or remove it"
            )
        own = {n.parts[0] for n in self._names if len(n.parts) == 2}
        within = sorted({n.parts[:2] for n in self._names if n.parts[0] not in own})
        # one sub-folder alone, as in Tiny ImageNet, is a class's own way to keep its images
        for (name, first), (again, second) in pairwise(within):
            if name == again:
                raise AccelkitError(
                    f"{where}/{name} holds folders of images ({first}, {second}, …) where a class "
                    f"holds images; name the part that has the classes, as in {where}/{name}"
                )

    def __len__(self) -> int:
        return len(self._names)

    @cached_property
    def captions(self) -> tuple[str, ...] | None:
        """From ``metadata.jsonl``, else from the ``.txt`` beside each image."""
        return read_captions(self._files, self._names) if self._captioned else None

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self._names:
            try:
                content = self._files.content(name)
            except Exception as error:  # zipfile raises as many kinds as Pillow
                if not self.skip_bad:
                    raise self._unreadable(name, error) from error
                content = b""
            digest.update(f"{name}\0".encode())
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def read(self, index: int, size: int) -> np.ndarray:
        name = self._names[index]
        try:
            with Image.open(io.BytesIO(self._files.content(name))) as image:
                return crop_and_resize(image, size)
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: PurePosixPath, error: Exception) -> AccelkitError:
        # Pillow's own words for an unknown format name an address in memory
        known = not isinstance(error, UnidentifiedImageError)
        reason = f"{type(error).__name__}: {error}" if known else "not in a known format"
        return AccelkitError(
            f"cannot read the image {self._files.where}/{name} ({reason}); "
            "remove it or use --skip-bad"
        )
