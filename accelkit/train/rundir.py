"""A run's directory: one run at a time, checkpoints that are whole or absent."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.files import explain_failure, write_json

SETTINGS = "run.json"
_LOCK = ".lock"


class RunDirectory:
    """Where a run leaves its settings, checkpoints and results.

    Args:
        path: the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None

    def open(
        self, settings: dict[str, Any], *, resume: bool, overwrite: bool, free: frozenset[str]
    ) -> None:
        """Claim the directory for a run with ``settings``.

        Args:
            settings: plain data; stored, and compared with what is stored when resuming.
            resume: go on with the run that is there.
            overwrite: remove the run that is there.
            free: settings that may differ between a run and its resumption.

        Raises:
            AccelkitError: the directory holds something and neither is given, holds no run to
                resume or overwrite, belongs to another run's process, or the settings differ.
        """
        if self.path.exists() and not self.path.is_dir():
            raise AccelkitError(f"the output {self.path} is a file; give a directory")
        content = self._content()
        if content and not (resume or overwrite):
            raise AccelkitError(
                f"the output directory {self.path} is not empty; go on with --resume latest, "
                "start anew with --overwrite, or give another -o"
            )
        if content and overwrite and not resume and SETTINGS not in content:
            raise AccelkitError(
                f"{self.path} holds files but no accelkit run; --overwrite removes only a run, "
                "give another -o"
            )
        if resume and SETTINGS not in content:
            raise AccelkitError(f"there is no run in {self.path} to resume; leave --resume out")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AccelkitError(f"cannot make the output directory {self.path}: {error}") from error
        self._claim()
        if resume:
            self._compare(settings, free)
        elif content:
            self._clear()
        write_json(self.path / SETTINGS, settings)

    def close(self) -> None:
        """Let another run have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def abandon(self) -> None:
        """Leave nothing of a run that has done nothing yet."""
        if self._content() == [SETTINGS]:
            (self.path / SETTINGS).unlink()
            (self.path / _LOCK).unlink()
            self.path.rmdir()

    def stored(self) -> dict[str, Any]:
        """Return the settings of the run that is there, empty if there is none."""
        try:
            return json.loads((self.path / SETTINGS).read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise AccelkitError(
                f"cannot read the run's settings {self.path / SETTINGS}: {error}"
            ) from error

    def latest(self) -> tuple[int, Path] | None:
        """Return the newest whole checkpoint and its step, or None."""
        found = self._named("step")
        return found[-1] if found else None

    @contextmanager
    def writing(self, step: int, keep: int, main: bool, barrier: Any) -> Iterator[Path]:
        """Give a folder to write step's checkpoint into; rename it into place when all is there.

        Args:
            step: optimiser steps done.
            keep: how many checkpoints remain, the newest; 0 keeps all.
            main: whether this process renames and prunes.
            barrier: called where all processes have to meet.
        """
        part = self.checkpoints / f"partial-{step:08d}"
        if main:
            for _, stale in self._named("partial"):
                shutil.rmtree(stale)
            with explain_failure(part):
                part.mkdir(parents=True)
        barrier()
        with explain_failure(part):
            try:
                yield part
            except BaseException:
                if main:
                    shutil.rmtree(part, ignore_errors=True)
                raise
        barrier()
        if main:
            done = self.checkpoints / f"step-{step:08d}"
            if done.exists():
                shutil.rmtree(done)
            with explain_failure(part):
                _flush(part)
            part.rename(done)
            for _, old in self._named("step")[:-keep] if keep else ():
                shutil.rmtree(old)

    def _named(self, kind: str) -> list[tuple[int, Path]]:
        """Return the folders that :meth:`writing` names so, by rising step; nothing else."""
        entries = self.checkpoints.glob(f"{kind}-*")
        matches = ((re.fullmatch(rf"{kind}-(\d{{8,}})", p.name), p) for p in entries)
        return sorted((int(match[1]), p) for match, p in matches if match and p.is_dir())

    def _content(self) -> list[str]:
        try:
            return [entry.name for entry in self.path.iterdir() if entry.name != _LOCK]
        except FileNotFoundError:
            return []

    def _claim(self) -> None:
        lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise AccelkitError(
                f"another run is at work in {self.path}; wait for it or give another -o"
            ) from error
        self._lock = lock  # the system releases it with the process, however that ends

    def _compare(self, settings: dict[str, Any], free: frozenset[str]) -> None:
        old = self.stored()
        new = json.loads(json.dumps(settings))
        changed = [
            k
            for k in sorted(old.keys() | new)
            if k not in free and _given(old.get(k)) != _given(new.get(k))
        ]
        if changed:
            shown = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in changed)
            raise AccelkitError(
                f"the run in {self.path} has other settings ({shown}); resume with the same, "
                "or start anew with --overwrite"
            )

    def _clear(self) -> None:
        # the settings last: killed midway, what is left is still known as a run
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == SETTINGS):
            if entry.name == _LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _given(value: Any) -> Any:
    """Leave out what is None, as are settings that were not known yet when a run began."""
    if not isinstance(value, dict):
        return value
    return {k: _given(v) for k, v in value.items() if v is not None}


def _flush(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename never precedes them."""
    for entry in folder.rglob("*"):
        if entry.is_file():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
