"""What a bench has measured already, kept by what it depends on."""

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
        """Keep other benches out, and remove what a killed one did not come to remove.

        Raises:
            AccelkitError: one is at work here, or the folder cannot be made.
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
        """Return the result that is there, None without one or with a broken one, which warns."""
        path = self.path(settings) / _RESULT
        if not path.exists():
            return None
        try:
            found = read_record(path)
            if found["settings"] != json.loads(json.dumps(settings)):
                raise AccelkitError("it is of other settings")
            return found["result"]
        except (AccelkitError, KeyError, TypeError) as error:
            warnings.warn(
                f"cannot use {path} ({error}); measuring again", AccelkitWarning, stacklevel=3
            )
            return None

    def put(self, settings: dict[str, Any], result: Any) -> None:
        """Keep a result; what it was made of in its folder is no longer needed."""
        path = self.path(settings)
        write_record(path / _RESULT, {"settings": settings, "result": result}, AGAIN)
        _remove_folders(path)

    def made(self, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
        """Return the result that is there, or else make and keep it."""
        if (found := self.get(settings)) is None:
            found = make()
            self.put(settings, found)
        return found


def _remove_folders(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
