"""A run's directory: one run at a time, checkpoints that are whole or absent."""

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
_FINGERPRINTS = "fingerprints"

SUMS = "checksums.json"
"""List of a checkpoint's files and their SHA-256."""

_REMOVED = f"removed{PARTIAL}"


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
            self._compare(settings, free)
        elif content:
            self._clear()
        write_record(self.path / SETTINGS, settings | known)

    def _refuse(self, content: list[str], resume: bool, overwrite: bool) -> None:
        """Raise AccelkitError, naming what works, unless the directory can be opened like this."""
        no_run = bool(content) and SETTINGS not in content
        if resume and not content:
            raise AccelkitError(f"there is no run in {self.path} to resume; leave --resume out")
        if resume and no_run:
            raise AccelkitError(
                f"there is no run in {self.path} to resume, but other files; leave --resume out "
                "and give another -o"
            )
        if no_run:
            only = ", and --overwrite removes only a run" if overwrite else ""
            raise AccelkitError(
                f"the output directory {self.path} is not empty and holds no accelkit run{only}; "
                "give another -o"
            )
        if content and not overwrite:
            self.stored()  # raises if only --overwrite is of use
        if content and not (resume or overwrite):
            raise AccelkitError(
                f"the output directory {self.path} is not empty; go on with --resume latest, "
                "start over with --overwrite, or give another -o"
            )

    def identify(self, fingerprints: dict[str, str]) -> None:
        """Keep digests of what the settings only name, or compare those that are kept.

        Args:
            fingerprints: by what they are of, such as ``images``.

        Raises:
            AccelkitError: the run began with something else.
        """
        stored = self._read()
        known = stored.get(_FINGERPRINTS, {})  # none in a run that an earlier version began
        if others := [n for n, digest in fingerprints.items() if known.get(n, digest) != digest]:
            raise AccelkitError(
                f"the {' and the '.join(others)} changed since the run in {self.path} began; "
                "resume with what it began with, or start over with --overwrite"
            )
        write_record(self.path / SETTINGS, {**stored, _FINGERPRINTS: known | fingerprints})

    def close(self) -> None:
        """Let another run have the directory."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def abandon(self) -> None:
        """Leave nothing of a run that has done nothing yet, if it was opened here."""
        if self._lock is not None and self._content() == [SETTINGS]:
            (self.path / SETTINGS).unlink()
            (self.path / LOCK).unlink()
            self.path.rmdir()

    def stored(self) -> dict[str, Any]:
        """Return the settings of the run that is there, empty if there is none.

        Raises:
            AccelkitError: they cannot be read, or are damaged.
        """
        return {k: v for k, v in self._read().items() if k != _FINGERPRINTS}

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
                    old.rename(self.checkpoints / f"partial-{number:08d}")  # never seen half gone
                self._remove_stale()

    def check(self, folder: Path) -> bool:
        """Compare the files of a checkpoint with their checksums; False if it has none.

        Raises:
            AccelkitError: a file is missing or damaged.
        """
        if not (folder / SUMS).exists():  # of an earlier version
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
                raise AccelkitError(f"{name} is no file of it")
            if found[name] != recorded[name]:
                raise DamagedError(Path(name))
        return True

    def _read(self) -> dict[str, Any]:
        path = self.path / SETTINGS
        if not path.exists():
            return {}
        afresh = f"start over with --overwrite, or remove {self.path}"
        try:
            found = read_record(path, afresh)
        except DamagedError:
            raise
        except AccelkitError as error:
            raise AccelkitError(f"cannot read the run's settings: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get(_FINGERPRINTS, {}), dict):
            raise AccelkitError(f"{path} holds no settings of a run; {afresh}")
        return found

    def _remove_stale(self) -> None:
        for _, stale in self._named("partial"):
            shutil.rmtree(stale)

    def _named(self, kind: str) -> list[tuple[int, Path]]:
        """Return the folders that :meth:`writing` names so, by rising step; nothing else."""
        entries = self.checkpoints.glob(f"{kind}-*")
        matches = ((re.fullmatch(rf"{kind}-(\d{{8,}})", p.name), p) for p in entries)
        return sorted((int(match[1]), p) for match, p in matches if match and p.is_dir())

    def _content(self) -> list[str]:
        """Return what is in the directory, but for what is left of a run that never began."""
        ours = (LOCK, _REMOVED, SETTINGS + PARTIAL)
        try:
            return [entry.name for entry in self.path.iterdir() if entry.name not in ours]
        except FileNotFoundError:
            return []

    def _compare(self, settings: dict[str, Any], free: frozenset[str]) -> None:
        old, new = _flat(self.stored(), free), _flat(json.loads(json.dumps(settings)), free)
        changed = [name for name in sorted(old.keys() | new) if old.get(name) != new.get(name)]
        if changed:
            shown = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in changed)
            raise AccelkitError(
                f"the run in {self.path} has other settings ({shown}); resume with the same, "
                "or start over with --overwrite"
            )

    def _clear(self) -> None:
        # the settings last: killed midway, what is left is still known as a run
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == SETTINGS):
            if entry.name == LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():  # never seen half gone, as it is resumed
                entry = entry.rename(self.path / _REMOVED)
            remove(entry)


def _flat(settings: dict[str, Any], free: frozenset[str]) -> dict[str, Any]:
    """Return settings by dotted name, without the free ones and those that are None.

    None are also those that were not known yet when a run began.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name not in free:
            flat |= {f"{name}.{k}": v for k, v in _flat(value, frozenset()).items()}
        elif value is not None and name not in free:
            flat[name] = value
    return flat


def _sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a folder's files by their path in it.

    The list itself is left out, and so are hidden files, such as those of a file manager.
    """
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    paths = sorted(p for p in files if p != folder / SUMS)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        sums = pool.map(sum_of_file, paths)
        return {p.relative_to(folder).as_posix(): s for p, s in zip(paths, sums, strict=True)}
