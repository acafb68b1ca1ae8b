"""What every job is given: the names of model and data, the place of a run, and a reporter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelkit.assets import BUILTIN


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


@dataclass(frozen=True)
class Source:
    """Which model and data a job works on.

    Attributes:
        model: as :func:`accelkit.from_pretrained` takes it.
        data: ``digits``, a folder or a zip.
        revision: of a hub id.
        vae: directory or hub id of the autoencoder that goes with an original-layout file, or that
            a model trained from scratch is to work behind.
        num_heads: attention heads of an original-layout file of unpublished size.
        skip_bad: go on without images that cannot be read, and count them.
        flip: train on mirrored images as well.
        variant: of the model's weights, such as ``fp16``.
        class_map: file that sets the labels of the data's classes.
    """

    model: str = BUILTIN
    data: str = "digits"
    revision: str | None = None
    vae: str | None = None
    num_heads: int | None = None
    skip_bad: bool = False
    flip: bool = False
    variant: str | None = None
    class_map: str | None = None


@dataclass(frozen=True)
class Run:
    """Where a run goes and how it is watched."""

    output: Path
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: int = 100
    keep: int = 2
    preview_every: int = 0
    report_to: str | None = None
