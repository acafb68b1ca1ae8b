"""The files of a data set, in a folder or in a zip: listed, and read within bounds.

Data sets come from strangers. A name may point outside its archive, a link may point back to a
folder above it, a picture may be a pipe that never ends or inflate to more than the memory holds.
Such files are refused before they are read.
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

from accelkit.data.words import by_suffix, reason
from accelkit.errors import AccelkitError

_LITTER = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}
"""Names that operating systems add to folders and archives, apart from hidden files."""

_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
"""Compressions that :mod:`zipfile` stops inflating at a bound; 4 KiB of bzip2 hold up to 4 GB."""

_UTF8, _ENCRYPTED, _DOS_FOLDER = 0x800, 0x1, 0x10

_ARCHIVE = re.compile(r".+\.(7z|rar|tar|tar\.\w+|tbz2|tgz|txz|zip)", re.IGNORECASE)


class Files(ABC):
    """Files of one place, without hidden ones and the litter of operating systems.

    Attributes:
        where: the place.
        paths: all files, relative to the place.
        folders: names of the outermost folders, including empty ones.
        links: names of the outermost links that are broken, or that a zip holds: any of them may be
            meant as a folder.
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
            most: largest size in bytes that is read.

        Raises:
            Exception: the file cannot be read, is larger, or is not a regular file; :mod:`zipfile`
                and the decompressors raise many kinds of exception.
        """

    def text(self, path: PurePosixPath, most: int) -> str:
        """Return the content of a UTF-8 text file of at most ``most`` bytes.

        Raises:
            AccelkitError: the file cannot be read.
        """
        try:
            return self.content(path, most).decode("utf-8-sig")
        except Exception as error:  # see content
            raise self.unreadable(path, error) from error

    def unreadable(self, path: PurePosixPath, error: Exception) -> AccelkitError:
        """Return the error for a file that cannot be read."""
        return AccelkitError(
            f"cannot read {self.where}/{path} ({reason(error)}); correct or remove it"
        )

    def next_to(
        self, images: Sequence[PurePosixPath], suffix: str
    ) -> dict[PurePosixPath, PurePosixPath]:
        """Return files of a suffix that have an image of the same name, by path without suffix."""
        found = {p.with_suffix(""): p for p in self.paths if p.suffix.lower() == suffix}
        stems = {image.with_suffix("") for image in images} if found else set()
        return {stem: path for stem, path in found.items() if stem in stems}

    def refuse_archives(self) -> None:
        """Raise AccelkitError for archives among the files, such as shards of WebDataset."""
        if found := sorted(path for path in self.paths if _ARCHIVE.fullmatch(path.name)):
            raise AccelkitError(
                f"{self.where} holds archives ({found[0]}; {by_suffix(found)}), whose images would "
                "be left out; unpack them into folders, or move them elsewhere"
            )


def open_files(path: Path, matters: Callable[[PurePosixPath], bool]) -> Files:
    """Return the files of a folder, of a zip, or of a part of a zip.

    If a zip has a single outermost folder, that folder is listed, unless a part is named. Files
    next to the folder are then listed as ``../name``, since messages have to mention them too.

    Args:
        path: the folder, the zip, or the part.
        matters: whether a file is part of a data set. If such a file is next to the only folder, as
            a table of labels may be, the whole zip is listed.

    Raises:
        AccelkitError: the path does not exist, cannot be read, or is a hostile archive.
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
            f"no data at {path} that can be read: zips are the only archives that accelkit reads; "
            "unpack it into a folder per class, or with captions, and give that folder"
        )
    raise AccelkitError(
        f"no data at {path}, a file; give digits, a folder of images or a zip of one"
    )


def read_file(path: Path, most: int) -> bytes:
    """Return the bytes of a file that has at most ``most``.

    Raises:
        AccelkitError: the file is larger, or is a pipe or a device, which might never end.
        OSError: the file cannot be read.
    """
    if os.path.isdir(path):  # open() would name it by a number
        raise AccelkitError("it is a folder, not a file")
    # without O_NONBLOCK, opening a pipe waits until another process writes
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AccelkitError("it is a pipe or a device, not a file")
        _check_size(status.st_size, most)
        return file.read(status.st_size)  # read() allocates as much as it is asked for


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
    """A zip, or everything below ``part`` in it."""

    def __init__(self, path: Path, part: PurePosixPath) -> None:
        self.where = str(path) if part == PurePosixPath() else f"{path}/{part}"
        self._path, self._part = path, part
        self._open: tuple[int, zipfile.ZipFile] | None = None
        try:
            members = self._archive().infolist()
        except Exception as error:  # a broken directory raises many kinds, as a broken member does
            raise AccelkitError(f"cannot read the zip {path}: {error}") from error
        self._members: dict[PurePosixPath, zipfile.ZipInfo] = {}
        self._folders: set[PurePosixPath] = set()
        self._links: set[PurePosixPath] = set()
        for member in members:
            self._add(member)
        self.paths = list(self._members)
        if part != PurePosixPath():
            inside = [p for p in self.paths if p.is_relative_to(part) and p != part]
            self.paths = [p.relative_to(part) for p in inside]
        folders = [p.relative_to(part) for p in self._folders if p.is_relative_to(part)]
        outermost = [p.parts[0] for p in self.paths if len(p.parts) > 1]
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
                f"{self._path} is compressed by method {member.compress_type} ({path}), and "
                f"accelkit reads {' and '.join(_METHODS.values())} members; pack it again with one "
                "of these, or unpack it and give the folder"
            )
        self._members[path] = member
        if stat.S_ISLNK(member.external_attr >> 16):
            self._links.add(path)

    def _archive(self) -> zipfile.ZipFile:
        # a handle shared with a forked process would share its position in the file
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), zipfile.ZipFile(self._path))
        return self._open[1]


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise AccelkitError(
            f"it is {size / 2**20:,.0f} MiB large, at most {most / 2**20:,.0f} are read"
        )


def _name(member: zipfile.ZipInfo) -> str:
    """Return a member's path as its archiver meant it.

    Without the flag for UTF-8 a name should be in code page 437, but macOS and others write UTF-8
    and set no flag. Some archivers on Windows write backslashes.
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
