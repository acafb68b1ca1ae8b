"""Files that are whole or absent, and small ones with a checksum.

A file is written next to its place, flushed to the disk and renamed, and its folder is flushed
after it. :mod:`accelkit.files.tensors` does the same for tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.files.documents import read_json

RESUME, AGAIN = "go on with --resume latest", "run the same command again"
"""Advice after a failed write: for a run that can be resumed, and for other commands."""

PARTIAL = ".partial"
"""Suffix of temporary folders. A folder left by a killed process is removed by the next write."""

SUM = "sha256"
"""Key of the checksum in a record, which is a JSON object."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_IN_WORDS = (
    "no space left",
    "quota exceeded",
    "file too large",
    "file write failed",
    "unexpected pos",
)


class DamagedError(AccelkitError):
    """A file whose content does not match its checksum."""

    def __init__(self, path: Path, what_to_do: str = "") -> None:
        end = f"; {what_to_do}" if what_to_do else ""
        super().__init__(f"{path} is damaged, it does not match its checksum{end}")


@contextmanager
def writing(path: Path, go_on: str = RESUME, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, and move it to ``path`` when it is complete.

    The temporary path is in a folder ``NAME.partial``, because libraries write temporary files next
    to their output. A file or folder at ``path`` is replaced; after an error it is kept.

    Args:
        path: the final path; missing parents are made.
        go_on: advice if it cannot be written.
        durable: flush the file to the disk first, and its folder afterwards, so that it is whole
            even after a power failure. Pictures, which no command reads back, need not be flushed.

    Raises:
        AccelkitError: the path cannot be written.
    """
    folder = path.with_name(path.name + PARTIAL)
    place = folder / path.name
    with explain_failure(path, go_on):
        try:
            remove(folder)
            folder.mkdir(parents=True)
            yield place
            if durable:
                flush(place)
            replace(place, path)
            if durable:
                flush_folder(path.parent)
        finally:
            with suppress(OSError):  # the first error says more
                remove(folder)


def replace(source: Path, target: Path) -> None:
    """Rename a file or folder to ``target``, which may exist."""
    if not (source.is_dir() and os.path.lexists(target)) and not _is_folder(target):
        source.replace(target)
        return
    old = source.with_name(source.name + ".replaced")  # a folder is not replaced in one step
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content, if it exists."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or a folder with its content, to the disk."""
    entries = [path, *path.rglob("*")] if path.is_dir() else [path]
    for entry in entries:
        if entry.is_dir():
            flush_folder(entry)
        elif entry.is_file():
            _flush(entry, os.O_RDWR)  # some file systems flush only handles for writing


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to the disk, after one was renamed or removed."""
    try:
        _flush(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # not supported there
            raise


def _flush(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextmanager
def explain_failure(path: Path, go_on: str = RESUME) -> Iterator[None]:
    """Turn a failed write into an AccelkitError with the path and the advice ``go_on``."""
    try:
        yield
    except AccelkitError:
        raise
    except Exception as error:  # safetensors and torch raise errors of their own
        text = " ".join(str(error).split())
        full = getattr(error, "errno", None) in _FULL
        if full or any(words in text.lower() for words in _FULL_IN_WORDS):
            raise AccelkitError(
                f"no room to write {path} ({text}); free some space and {go_on}: "
                "what was written before is intact"
            ) from error
        if isinstance(error, OSError) or "i/o error" in text.lower():
            raise AccelkitError(
                f"cannot write {path} ({text}); make that possible and {go_on}: "
                "what was written before is intact"
            ) from error
        raise


def write_bytes(path: Path, content: bytes, go_on: str = RESUME) -> None:
    """Write a small file; see :func:`writing`."""
    with writing(path, go_on) as part:
        part.write_bytes(content)


def write_json(path: Path, data: Any, go_on: str = RESUME) -> None:
    """Write plain data; see :func:`writing`."""
    write_bytes(path, (json.dumps(data, indent=2) + "\n").encode(), go_on)


def write_record(path: Path, data: dict[str, Any], go_on: str = RESUME) -> None:
    """Write plain data with its checksum, for :func:`read_record`."""
    write_json(path, {**data, SUM: _sum_of(data)}, go_on)


def read_record(path: Path, what_to_do: str = "") -> Any:
    """Return what :func:`write_record` wrote, without the checksum.

    A file without a checksum is accepted: an earlier version wrote it, or a user who edited it
    removed the checksum. So is a file that holds no object.

    Args:
        path: the file.
        what_to_do: advice for a damaged file, as the end of a sentence; "" if the caller adds it.

    Raises:
        DamagedError: the content does not match its checksum.
        AccelkitError: the file is missing, or no JSON.
    """
    try:
        data = read_json(path)
    except AccelkitError as error:
        raise AccelkitError(f"{error}; {what_to_do}" if what_to_do else str(error)) from error
    recorded = data.pop(SUM, None) if isinstance(data, dict) else None
    if recorded is not None and recorded != _sum_of(data):
        edited = f' (or, if you edited it, remove its "{SUM}")'
        raise DamagedError(path, what_to_do + edited if what_to_do else "")
    return data


def _sum_of(data: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(data))  # all keys are text now, and sort as text
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sum_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
