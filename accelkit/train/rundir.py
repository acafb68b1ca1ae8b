"""The directory of a run: one process at a time, and checkpoints that are whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.files.documents import read_json
from accelkit.files.locks import LOCK, claim
from accelkit.files.writing import (
    PARTIAL,
    SUM,
    DamagedError,
    explain_failure,
    flush,
    flush_folder,
    read_record,
    remove,
    sum_of_file,
    write_record,
)

SETTINGS = "run.json"
SUMS = "checksums.json"
"""List of a checkpoint's files and their SHA-256."""

_FINGERPRINTS = "fingerprints"
_REMOVED = f"removed{PARTIAL}"


class RunDirectory:
    """The directory of a run's settings, checkpoints and results.

    Args:
        path: the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None

    def open(
        self,
        settings: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        free: frozenset[str],
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """Claim the directory for a run with ``settings``.

        Args:
            settings: plain data; stored, and compared with the stored settings when resuming.
            resume: whether to continue the run in the directory.
            overwrite: whether to remove the run in the directory.
            free: settings that may change when a run is resumed.
            defaults: values of settings that did not exist when a resumed run began.

        Raises:
            AccelkitError: the directory is not empty and neither is given, holds no run to resume
                or overwrite, is in use by another process, or the settings differ.
        """
        if self.path.exists() and not self.path.is_dir():
            raise AccelkitError(f"the output {self.path} is a file; give a directory")
        content = self._content()
        self._refuse(content, resume, overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AccelkitError(f"cannot make the output directory {self.path}: {error}") from error
        self._lock = claim(self.path, "another run")
        remove(self.path / _REMOVED)
        known: dict[str, Any] = {}
        if resume:
            known = {k: v for k, v in self._read().items() if k == _FINGERPRINTS}
            self._compare(settings, free, defaults or {})
        elif content:
            self._clear()
        write_record(self.path / SETTINGS, settings | known)

    def _refuse(self, content: list[str], resume: bool, overwrite: bool) -> None:
        """Raise AccelkitError, naming the options that work, if these do not."""
        if resume and not content:
            raise AccelkitError(f"there is no run in {self.path} to resume; leave --resume out")
        if not content:
            return
        if SETTINGS not in content and resume:
            raise AccelkitError(
                f"there is no run in {self.path} to resume, but other files; leave --resume out "
                "and give another -o"
            )
        if SETTINGS not in content:
            only = ", and --overwrite removes only a run" if overwrite else ""
            raise AccelkitError(
                f"the output directory {self.path} is not empty and holds no accelkit run{only}; "
                "give another -o"
            )
        if overwrite:
            return
        self.stored()  # raises an error of its own if only --overwrite works
        if not resume:
            raise AccelkitError(
                f"the output directory {self.path} is not empty; go on with --resume latest, "
                "start over with --overwrite, or give another -o"
            )

    def identify(self, fingerprints: dict[str, str]) -> None:
        """Store digests of data that the settings only name, or compare them with stored ones.

        Args:
            fingerprints: digests by the name of the data, such as ``images``.

        Raises:
            AccelkitError: the run began with other data.
        """
        stored = self._read()
        known = stored.get(_FINGERPRINTS, {})  # earlier versions stored none
        if others := [n for n, digest in fingerprints.items() if known.get(n, digest) != digest]:
            raise AccelkitError(
                f"the {' and the '.join(others)} changed since the run in {self.path} began; "
                "resume with what it began with, or start over with --overwrite"
            )
        write_record(self.path / SETTINGS, {**stored, _FINGERPRINTS: known | fingerprints})

    def close(self) -> None:
        """Release the directory for other runs."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def abandon(self) -> None:
        """Remove the directory if this process opened it and the run has written nothing."""
        if self._lock is not None and self._content() == [SETTINGS]:
            (self.path / SETTINGS).unlink()
            (self.path / LOCK).unlink()
            self.path.rmdir()

    def stored(self) -> dict[str, Any]:
        """Return the settings of the run in the directory, empty without one.

        Raises:
            AccelkitError: the settings cannot be read, or are damaged.
        """
        return {k: v for k, v in self._read().items() if k != _FINGERPRINTS}

    def latest(self) -> tuple[int, Path] | None:
        """Return the step and folder of the newest checkpoint, or None."""
        found = self._named("step")
        return found[-1] if found else None

    @contextmanager
    def writing(self, step: int, keep: int, main: bool, barrier: Any) -> Iterator[Path]:
        """Yield a folder for a checkpoint, and rename it into place once it is complete.

        Args:
            step: number of optimiser steps done.
            keep: number of newest checkpoints to keep, 0 for all.
            main: whether this is the process that renames and prunes.
            barrier: function that waits for all processes.
        """
        part, done = (self.checkpoints / f"{kind}-{step:08d}" for kind in ("partial", "step"))
        if main:
            with explain_failure(part):
                self._remove_stale()
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
            with explain_failure(part):
                write_record(part / SUMS, {"files": _sums(part)})
                flush(part)
                remove(done)
                part.rename(done)
                for folder in (self.checkpoints, self.path):
                    flush_folder(folder)
                for number, old in self._named("step")[:-keep] if keep else ():
                    # Renamed first, so that no checkpoint is ever half removed.
                    old.rename(self.checkpoints / f"partial-{number:08d}")
                self._remove_stale()

    def check(self, folder: Path) -> bool:
        """Compare the files of a checkpoint with their checksums; False if it has none.

        Raises:
            AccelkitError: a file is missing or damaged.
        """
        if not (folder / SUMS).exists():  # written by an earlier version
            return False
        record = read_record(folder / SUMS)
        recorded = record.get("files") if isinstance(record, dict) else None
        if not isinstance(recorded, dict) or SUM not in read_json(folder / SUMS):
            raise DamagedError(folder / SUMS)
        found = _sums(folder)
        for name in sorted(recorded.keys() | found):
            if name not in found:
                raise AccelkitError(f"{name} is missing")
            if name not in recorded:
                raise AccelkitError(f"{name} is not in {SUMS}")
            if found[name] != recorded[name]:
                raise DamagedError(Path(name))
        return True

    def _read(self) -> dict[str, Any]:
        path = self.path / SETTINGS
        if not path.exists():
            return {}
        remedy = f"start over with --overwrite, or remove {self.path}"
        try:
            found = read_record(path, remedy)
        except DamagedError:
            raise
        except AccelkitError as error:
            raise AccelkitError(f"cannot read the run's settings: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get(_FINGERPRINTS, {}), dict):
            raise AccelkitError(f"{path} holds no settings of a run; {remedy}")
        return found

    def _remove_stale(self) -> None:
        for _, stale in self._named("partial"):
            shutil.rmtree(stale)

    def _named(self, kind: str) -> list[tuple[int, Path]]:
        """Return the folders of one kind that :meth:`writing` makes, by rising step."""
        entries = self.checkpoints.glob(f"{kind}-*")
        matches = ((re.fullmatch(rf"{kind}-(\d{{8,}})", p.name), p) for p in entries)
        return sorted((int(match[1]), p) for match, p in matches if match and p.is_dir())

    def _content(self) -> list[str]:
        """Return the names in the directory, without leftovers of a run that never began."""
        ours = (LOCK, _REMOVED, SETTINGS + PARTIAL)
        try:
            return [entry.name for entry in self.path.iterdir() if entry.name not in ours]
        except FileNotFoundError:
            return []

    def _compare(
        self, settings: dict[str, Any], free: frozenset[str], defaults: dict[str, Any]
    ) -> None:
        new = _flat(json.loads(json.dumps(settings)), free)
        stored = self.stored()
        old = {k: v for k, v in _flat(defaults, free).items() if not _holds(stored, k)}
        old |= _flat(stored, free)
        changed = [name for name in sorted(old.keys() | new) if old.get(name) != new.get(name)]
        if changed:
            shown = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in changed)
            raise AccelkitError(
                f"the run in {self.path} has other settings ({shown}); resume with the same, "
                "or start over with --overwrite"
            )

    def _clear(self) -> None:
        # The settings go last, so that the rest of a killed removal is still known as a run.
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == SETTINGS):
            if entry.name == LOCK:
                continue
            # Renamed first, so that no half removed folder is ever resumed.
            if entry.is_dir() and not entry.is_symlink():
                entry = entry.rename(self.path / _REMOVED)
            remove(entry)


def _flat(settings: dict[str, Any], free: frozenset[str]) -> dict[str, Any]:
    """Return settings by dotted name, without the free ones and those that are None."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name not in free:
            flat |= {f"{name}.{k}": v for k, v in _flat(value, frozenset()).items()}
        elif value is not None and name not in free:
            flat[name] = value
    return flat


def _holds(settings: Any, name: str) -> bool:
    """Return whether nested settings have a value, None included, at a dotted name."""
    for key in name.split("."):
        if not isinstance(settings, dict) or key not in settings:
            return False
        settings = settings[key]
    return True


def _sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a folder's files by their path in it.

    The list itself and hidden files, such as those of a file manager, are left out.
    """
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    paths = sorted(p for p in files if p != folder / SUMS)
    with ThreadPoolExecutor() as pool:  # hashing releases the lock of the interpreter
        sums = pool.map(sum_of_file, paths)
        return {p.relative_to(folder).as_posix(): s for p, s in zip(paths, sums, strict=True)}
