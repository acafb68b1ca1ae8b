"""What a bench has measured already, kept by what it depends on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.files import AGAIN, read_json, write_json

_RESULT, _LOCK = "cell.json", ".lock"


class Cells:
    """Results in folders named by a hash of their settings: none is computed twice.

    Nothing says whether a run goes on with another; whatever was finished with the same settings is
    taken, and the rest is done.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other benches out.

        Raises:
            AccelkitError: one is at work here, or the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise AccelkitError(f"cannot write to {self.folder}: {error}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AccelkitError(
                    f"another bench is at work in {self.folder}; wait for it or give another -o"
                ) from error
            yield
        finally:
            os.close(lock)  # which releases it

    def clear(self) -> None:
        """Forget all results."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)

    def path(self, settings: dict[str, Any]) -> Path:
        """Return the folder of what was, or is to be, measured with ``settings``, plain data."""
        text = json.dumps(settings, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def get(self, settings: dict[str, Any]) -> Any | None:
        """Return the result that is there, or None."""
        path = self.path(settings) / _RESULT
        return read_json(path)["result"] if path.exists() else None

    def put(self, settings: dict[str, Any], result: Any) -> None:
        """Keep a result; what it was made of in its folder is no longer needed."""
        path = self.path(settings)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / _RESULT, {"settings": settings, "result": result}, AGAIN)
        for entry in path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)

    def made(self, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
        """Return the result that is there, or else make and keep it."""
        if (found := self.get(settings)) is None:
            found = make()
            self.put(settings, found)
        return found
