"""The receiver of a job's messages and progress."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Receives a job's messages and progress, which the command line draws."""

    def say(self, text: str) -> None:
        """Print a line."""

    def advance(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` parts of ``task`` are finished, with a note."""


class Silent:
    """The reporter of a process whose progress another process reports."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def advance(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show nothing."""
