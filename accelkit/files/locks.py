"""One process at a time in a folder, by a lock that no killed process leaves behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelkit.errors import AccelkitError

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Keep other processes out of ``folder`` that ask by this function as well.

    The system releases the lock with its process, however that ends; the file that a killed one
    leaves means nothing.

    Args:
        folder: which must be there.
        who: what a message calls the other process, e.g. ``"another accelkit sample"``.

    Raises:
        AccelkitError: another process is at work there, or the folder cannot be written to.
    """
    path = folder / LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise AccelkitError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        if not _taken(lock, path):
            raise AccelkitError(f"{who} is at work in {folder}; wait for it or give another -o")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _taken(lock: int, path: Path) -> bool:
    """Take the lock of an open file, unless it is held or was removed before it was taken."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.stat(path), os.fstat(lock))
    except OSError:
        return False
