"""Runs of the command line, each in its own process, and their result as a user sees it.

The processes are forked from one that has imported everything, which saves ten seconds each.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch

from accelkit import cli
from accelkit.errors import LONGEST

SILENT, TRACEBACK, DEAD_END, HANG = "silent", "traceback", "dead end", "hang"
FAULTS = (SILENT, TRACEBACK, DEAD_END, HANG)
"""A wrong result without a message; a traceback or crash; a refusal whose advice does not help, or
no readable message; a command that never ends, or takes all memory."""

SECONDS = 120.0
_ADDRESSES = 16 * 2**30
_APPETITE = 4 * 2**30
_WRITES = {
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "shutil.copyfile",
    "shutil.move",
    "shutil.rmtree",
}
_MESSAGE = "accelkit: "
_WARNING = "accelkit: warning: "
_OWN_FAULT = "accelkit: a fault of accelkit's own"

Event = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Ran:
    """The result of a command.

    Attributes:
        status: exit status, negative for the signal that ended it; None if it took too long.
        out, err: printed text.
        seconds: duration.
        writes: number of operations on the disk that it began; 0 if it was killed.
        peak: most bytes of memory in use.
    """

    status: int | None
    out: str
    err: str
    seconds: float
    writes: int
    peak: int

    @property
    def messages(self) -> list[str]:
        """Messages to the user, without warnings."""
        lines = self.err.splitlines()
        return [x for x in lines if x.startswith(_MESSAGE) and not x.startswith(_WARNING)]

    @property
    def warned(self) -> bool:
        """Whether it printed a warning."""
        return _WARNING in self.err

    @property
    def fault(self) -> str | None:
        """The fault that the result shows whatever the command was, or None."""
        if self.status is None or self.peak > _APPETITE:
            return HANG
        if "Traceback (most recent call last)" in self.err or _OWN_FAULT in self.err:
            return TRACEBACK
        if self.status < 0:
            return TRACEBACK
        readable = all(len(line) <= LONGEST and line.isprintable() for line in self.messages)
        if not readable or (self.status != 0 and len(self.messages) != 1):
            return DEAD_END
        return None


def prepare() -> None:
    """Prepare this process for forking; its children use no GPU and no hub."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    torch.set_num_threads(1)  # a pool of threads does not survive a fork


def run(
    arguments: Sequence[str],
    folder: Path,
    *,
    seconds: float = SECONDS,
    kill_at: Callable[[int, Event], bool] | None = None,
    kill_after: float | None = None,
) -> Ran:
    """Run ``accelkit`` with arguments in a working directory.

    Args:
        arguments: arguments of the command line.
        folder: the working directory.
        seconds: time after which the command counts as a hang.
        kill_at: called before each operation that changes the disk, with its number from 0 and the
            operation; the process is killed if it returns true.
        kill_after: seconds after which the process is killed.
    """
    with tempfile.TemporaryDirectory(prefix="accelkit-trial-") as kept:
        texts = Path(kept)
        for name in ("out", "err"):  # a child may be killed before it makes them
            (texts / name).touch()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _run_here(arguments, folder, texts, kill_at)
        limit = began + (seconds if kill_after is None else kill_after)
        status, usage = _wait(child, limit)
        gone = kill_after is None and status is None
        if status is None:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
        counted = texts / "writes"
        return Ran(
            None if gone else os.waitstatus_to_exitcode(status),
            (texts / "out").read_text(errors="backslashreplace"),
            (texts / "err").read_text(errors="backslashreplace"),
            time.monotonic() - began,
            int(counted.read_text()) if counted.exists() else 0,
            usage.ru_maxrss * 1024,
        )


def _wait(child: int, limit: float) -> tuple[int | None, Any]:
    """Return a process's status and usage; the status is None if it has not ended by ``limit``."""
    while time.monotonic() < limit:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage
        time.sleep(0.002)
    return None, None


def _run_here(
    arguments: Sequence[str],
    folder: Path,
    texts: Path,
    kill_at: Callable[[int, Event], bool] | None,
) -> None:
    """Run the command in this process and exit."""
    status = 1
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(texts / name, os.O_WRONLY), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        os.environ["ACCELKIT_CACHE"] = str(folder / "cache")
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.argv = ["accelkit", *arguments]
        count = _counting(kill_at)
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        (texts / "writes").write_text(str(count()))
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _counting(kill_at: Callable[[int, Event], bool] | None) -> Callable[[], int]:
    """Count operations that change the disk from here on; return a function for the number."""
    done = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if name == "open":
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            changes = name in _WRITES
        if changes:
            if kill_at is not None and kill_at(done, (name, arguments)):
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    sys.addaudithook(hook)
    return lambda: done


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        name: description of the trial.
        judge: runs it in an empty folder, and returns the fault with its evidence, or None.
    """

    name: str
    judge: Callable[[Path], tuple[str, str] | None]


def shown(ran: Ran) -> str:
    """Return a description of a run's end: status and last line."""
    lines = [line for line in ran.err.splitlines() if line.strip()]
    return f"status {ran.status}, {lines[-1][:300] if lines else 'nothing printed'}"


Trials = Iterator[Trial]
