"""The files of a data set, in a folder or in a zip: listed, and read within bounds.

Data sets come from strangers. A name may lead out of its archive, a link may lead back to a folder
above it, a picture may be a pipe that never ends or inflate to more than the memory holds. What
cannot be read safely is refused before it is read.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from accelkit.data.words import by_suffix
from accelkit.errors import AccelkitError

_LITTER = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}
"""What operating systems leave in folders and archives, besides hidden files."""

_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
"""Compressions that :mod:`zipfile` stops inflating at a bound; 4 KiB of bzip2 hold up to 4 GB."""

_UTF8, _ENCRYPTED, _DOS_FOLDER = 0x800, 0x1, 0x10

_ARCHIVE = re.compile(r".+\.(7z|rar|tar|tar\.\w+|tbz2|tgz|txz|zip)", re.IGNORECASE)


class Files(ABC):
    """Files of one place, without hidden ones and what operating systems leave behind.

    Attributes:
        where: the place.
        paths: all files, relative to the place.
        folders: names of the outermost folders, empty ones too.
        links: names of the outermost links that lead to nothing, or that a zip holds: any of them
            may be meant as a folder.
    """

    where: str
    paths: list[PurePosixPath]
    folders: set[str]
    links: set[str]

    @abstractmethod
    def content(self, path: PurePosixPath, most: int) -> bytes:
        """Return a file's bytes.

        Args:
            path: one of ``paths``.
            most: bytes that are read at the most.

        Raises:
            Exception: the file cannot be read, is larger, or is none; :mod:`zipfile` and the
                decompressors raise many kinds.
        """


def open_files(path: Path, matters: Callable[[PurePosixPath], bool]) -> Files:
    """Return the files of a folder, of a zip, or of a part of a zip.

    If a zip has a single outermost folder, that folder is listed, unless a part is named. Files
    next to it are listed as ``../name``, for what they are has to be said as well.

    Args:
        path: the folder, the zip, or the part.
        matters: whether a file is part of a data set. One next to the only folder, such as a table
            of labels, would be lost if that folder were listed alone.

    Raises:
        AccelkitError: nothing is there, it cannot be read, or it is hostile.
    """
    for place in (path, *path.parents):
        if place.suffix.lower() == ".zip" and os.path.isfile(place):
            found = Zip(place, PurePosixPath(path.relative_to(place).as_posix()))
            outermost = [name for name in found.paths if len(name.parts) == 1]
            alone = len(found.folders) == 1 and not found.links
            if place == path and alone and not any(map(matters, outermost)):
                found = Zip(place, PurePosixPath(*found.folders))
                found.paths += [PurePosixPath("..", name) for name in outermost]
            return found
    if os.path.isdir(path):
        return Folder(path)
    if not os.path.exists(path):
        raise AccelkitError(f"no data at {path}; give digits, a folder of images or a zip of one")
    if _ARCHIVE.fullmatch(path.name):
        raise AccelkitError(
            f"no data at {path} that can be read: of archives accelkit reads zips; unpack it into "
            "a folder per class, or with captions, and give that folder"
        )
    raise AccelkitError(
        f"no data at {path}, a file; give digits, a folder of images or a zip of one"
    )


def read_file(path: Path, most: int) -> bytes:
    """Return a file's bytes, which may be no more than ``most``.

    Raises:
        AccelkitError: it is larger, or a pipe or a device, which might never end.
        OSError: it cannot be read.
    """
    if os.path.isdir(path):  # which open() would call by a number
        raise AccelkitError("it is a folder, not a file")
    # without O_NONBLOCK, opening a pipe waits until somebody writes
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AccelkitError("it is a pipe or a device, not a file")
        _check_size(status.st_size, most)
        return file.read(status.st_size)  # read() reserves what it is asked for


class Folder(Files):
    """A folder and all below it. Links are followed, except to a folder that was read already."""

    def __init__(self, root: Path) -> None:
        self.where, self._root = str(root), root
        self.paths, self.links = [], set()
        reached: dict[str, PurePosixPath] = {}
        waiting = [PurePosixPath()]
        while waiting:
            folder = waiting.pop()
            real = os.path.realpath(root / folder)
            if real in reached:
                raise AccelkitError(
                    f"{root / reached[real]} and {root / folder} are the same folder, whose images "
                    "would count twice; remove the link"
                )
            reached[real] = folder
            for entry in _entries(root / folder):
                if _is_seen(entry.name):
                    (waiting if _is_folder(entry) else self.paths).append(folder / entry.name)
                    if folder == PurePosixPath() and not os.path.exists(entry.path):
                        self.links.add(entry.name)
        self.folders = {folder.name for folder in reached.values() if len(folder.parts) == 1}

    def content(self, path: PurePosixPath, most: int) -> bytes:
        """Return a file's bytes."""
        return read_file(self._root / path, most)


class Zip(Files):
    """A zip, or what is below ``part`` in it."""

    def __init__(self, path: Path, part: PurePosixPath) -> None:
        self.where = str(path) if part == PurePosixPath() else f"{path}/{part}"
        self._path, self._part = path, part
        self._open: tuple[int, zipfile.ZipFile] | None = None
        try:
            members = self._archive().infolist()
        except Exception as error:  # a broken directory raises as many kinds as a broken member
            raise AccelkitError(f"cannot read the zip {path}: {error}") from error
        self._members: dict[PurePosixPath, zipfile.ZipInfo] = {}
        self._folders: set[PurePosixPath] = set()
        self._links: set[PurePosixPath] = set()
        for member in members:
            self._add(member)
        self.paths = list(self._members)
        if part != PurePosixPath():
            inside = [p for p in self.paths if p.is_relative_to(part) and p != part]
            self.paths = [path.relative_to(part) for path in inside]
        folders = [p.relative_to(part) for p in self._folders if p.is_relative_to(part)]
        outermost = [path.parts[0] for path in self.paths if len(path.parts) > 1]
        self.folders = {*outermost, *(folder.parts[0] for folder in folders if folder.parts)}
        self.links = {link.name for link in self._links if link.parent == part}

    def content(self, path: PurePosixPath, most: int) -> bytes:
        """Return a member's bytes."""
        member = self._members[PurePosixPath(posixpath.normpath(self._part / path))]
        _check_size(member.file_size, most)
        with self._archive().open(member) as file:
            return file.read(member.file_size + 1)  # to the end, where the checksum is compared

    def _add(self, member: zipfile.ZipInfo) -> None:
        name = _name(member)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:/", name):
            raise AccelkitError(
                f"{self._path} holds {name!r}, a name that leads out of it; pack it again with "
                "names relative to the data set's folder"
            )
        if not all(map(_is_seen, path.parts)):
            return
        if name.endswith("/") or (member.external_attr & _DOS_FOLDER and not member.file_size):
            self._folders.add(path)
            return
        if path in self._members:
            raise AccelkitError(
                f"{self._path} holds {path} twice and does not say which is meant; pack it again"
            )
        if member.flag_bits & _ENCRYPTED:
            raise AccelkitError(
                f"{self._path} is encrypted ({path}); unpack it with its password and give the "
                "folder"
            )
        if member.compress_type not in _METHODS:
            raise AccelkitError(
                f"{self._path} is compressed by method {member.compress_type} ({path}); accelkit "
                f"reads members that are {' or '.join(_METHODS.values())}: pack it again so, or "
                "unpack it and give the folder"
            )
        self._members[path] = member
        if stat.S_ISLNK(member.external_attr >> 16):
            self._links.add(path)

    def _archive(self) -> zipfile.ZipFile:
        # a handle shared with a forked process would share its position in the file
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self._path))
        return self._open[1]


def next_to(
    images: Sequence[PurePosixPath], files: Files, suffix: str
) -> dict[PurePosixPath, PurePosixPath]:
    """Return the files of a suffix that have an image next to them, by their paths without it."""
    found = {p.with_suffix(""): p for p in files.paths if p.suffix.lower() == suffix}
    stems = {image.with_suffix("") for image in images} if found else set()
    return {stem: path for stem, path in found.items() if stem in stems}


def refuse_archives(files: Files) -> None:
    """Refuse a data set some of whose images are in archives of their own.

    Raises:
        AccelkitError: it holds archives, as ImageNet's and WebDataset's shards are.
    """
    if found := sorted(path for path in files.paths if _ARCHIVE.fullmatch(path.name)):
        raise AccelkitError(
            f"{files.where} holds archives ({found[0]}; {by_suffix(found)}), whose images would be "
            "left out; unpack them into folders, or move them elsewhere"
        )


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise AccelkitError(
            f"it is {size / 2**20:,.0f} MiB large, at most {most / 2**20:,.0f} are read"
        )


def _name(member: zipfile.ZipInfo) -> str:
    """Return a member's path as it is meant.

    Without the flag for UTF-8 a name should be in code page 437, but macOS and others write UTF-8
    and set no flag. Some archivers of Windows write backslashes.
    """
    name = member.filename
    if not member.flag_bits & _UTF8:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and name not in _LITTER


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        raise AccelkitError(
            f"cannot read the folder {folder} ({error.strerror}); allow it, or move it elsewhere"
        ) from error
