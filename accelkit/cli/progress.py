"""Progress of a job: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class TerminalReporter:
    """Draws a job's progress on standard error, so that output can be piped.

    On a terminal each task is a bar with rate, note and time left. Elsewhere a line is printed when
    a task starts and ends and every ten seconds between.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> TerminalReporter:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` parts of ``task`` are finished."""
        if not self._console.is_terminal:
            self._line(task, done, total, note)
            return
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, note=note)
        self._bars.update(self._tasks[task], completed=done, total=total, note=note)

    def _line(self, task: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        began, first = self._began.setdefault(task, (now, done))
        due = now - self._printed.get(task, -_SECONDS_BETWEEN_LINES) >= _SECONDS_BETWEEN_LINES
        if not due and done != total:
            return
        self._printed[task] = now
        left = (now - began) / (done - first) * (total - done) if done > first else None
        parts = [f"{task} {done}/{total}", note, f"{left:.0f} s left" if left else ""]
        self.say("  ".join(part for part in parts if part))
