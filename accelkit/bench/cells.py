"""The measurements of a bench, kept by the settings that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.files.locks import claim
from accelkit.files.writing import AGAIN, read_record, write_record

_RESULT = "cell.json"


class Cells:
    """Results in folders named by a hash of their settings, so that none is computed twice.

    A run does not record which run it continues: it takes every result with the same settings and
    makes the rest.

    Args:
        folder: the folder of all results.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other benches out while entered, and remove the leftovers of a killed one.

        Raises:
            AccelkitError: another bench is at work here, or the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AccelkitError(f"cannot write to {self.folder}: {error}") from error
        lock = claim(self.folder, "another bench")
        try:
            for path in self.folder.glob(f"*/{_RESULT}"):
                _remove_folders(path.parent)
            yield
        finally:
            os.close(lock)  # releases the lock

    def clear(self) -> None:
        """Forget all results."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)

    def path(self, settings: dict[str, Any]) -> Path:
        """Return the folder of the result with ``settings``, which are plain data."""
        text = json.dumps(settings, sort_keys=True)
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def get(self, settings: dict[str, Any]) -> Any | None:
        """Return the result with ``settings``, None if missing or, with a warning, broken."""
        path = self.path(settings) / _RESULT
        if not path.exists():
            return None
        try:
            found = read_record(path)
            if found["settings"] != json.loads(json.dumps(settings)):
                raise AccelkitError("it has other settings")
            return found["result"]
        except (AccelkitError, KeyError, TypeError) as error:
            warnings.warn(
                f"cannot use {path} ({error}); measuring again", AccelkitWarning, stacklevel=3
            )
            return None

    def put(self, settings: dict[str, Any], result: Any) -> None:
        """Keep a result, and remove the folders that it was made from."""
        path = self.path(settings)
        write_record(path / _RESULT, {"settings": settings, "result": result}, AGAIN)
        _remove_folders(path)

    def made(self, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
        """Return the result with ``settings``, which is made and kept if there is none."""
        if (found := self.get(settings)) is None:
            found = make()
            self.put(settings, found)
        return found


def _remove_folders(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
