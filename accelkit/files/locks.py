"""Locks on folders: the system releases them with their process, however that ends.

The lock is on a file in the folder. A killed process leaves the file behind, without a lock.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelkit.errors import AccelkitError

LOCK = ".lock"


def claim(folder: Path, who: str) -> int:
    """Lock ``folder`` for this process and return the handle; closing it releases the lock.

    Args:
        folder: an existing folder.
        who: the other process in an error message, e.g. ``"another accelkit sample"``.

    Raises:
        AccelkitError: another process holds the lock, or the folder cannot be written to.
    """
    try:
        lock = _open(folder)
    except OSError as error:
        raise AccelkitError(
            f"cannot write to {folder} ({error.strerror}); make that possible, or give another -o"
        ) from error
    if not _taken(lock, folder):
        os.close(lock)
        raise AccelkitError(f"{who} is at work in {folder}; wait for it or give another -o")
    return lock


@contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Hold the lock of :func:`claim`, and remove its file afterwards."""
    lock = claim(folder, who)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def shared(folder: Path, clean: Callable[[], None]) -> Iterator[None]:
    """Share ``folder`` with other processes, after ``clean`` if there are none.

    Raises:
        OSError: the folder cannot be written to.
    """
    lock = _open(folder)
    try:
        if _taken(lock, folder):
            clean()
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def _open(folder: Path) -> int:
    return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)


def _taken(lock: int, folder: Path) -> bool:
    """Take the lock of an open file, unless it is held or the file was removed meanwhile."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.stat(folder / LOCK), os.fstat(lock))
    except OSError:
        return False
