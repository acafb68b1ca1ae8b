"""Command lines with a bad value for one option, generated from the options of the commands."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from accelkit.cli import app
from benchmarks.reliability.trial import SILENT, Trial, Trials, run, shown
from benchmarks.reliability.world import JOBS, copy_world

_VALID: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{job.name: (job.arguments, ()) for job in JOBS},
    "report": (("report",), ("bench",)),
    "reproduce": (("reproduce",), ("dvd-table-a2", "--dry-run")),
    "schedules": (("schedules",), ()),
    "convert": (("convert",), ("model", "out.pt")),
    "inspect": (("inspect", "--model", "model"), ()),
}
"""Arguments before and after an option and its value: a command that finishes in seconds."""

_AROUND: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("report", "directory"): (("report",), ()),
    ("reproduce", "name"): (("reproduce",), ()),
    ("schedules", "name"): (("schedules",), ()),
    ("convert", "source"): (("convert",), ("out.pt",)),
    ("convert", "target"): (("convert", "model"), ()),
}
"""Arguments before and after a value without an option."""

_NONSENSE = ("", "no-such-thing", "x" * 100_000, "a\nb\x1b[31m", "\udcff", "[/b]", "@;,=:+")
_PLACES = ("/dev/zero", "pipe", "s.toml", "data", "/proc/self/mem")
_WHOLE = ("x", "", "1.5", "nan", "inf", "1e400", "-1", str(10**30), "9" * 5_000)
_FRACTIONS = ("x", "", "nan", "inf", "-inf", "1e400", "-1")
_ANY = {"output", "target"}
"""Parameters that name a new file, so that nearly any value is valid."""
_UNREAD = {
    *("class_map", "data", "features", "features_sha256", "kernels", "model", "reference"),
    *("revision", "vae"),
}
"""Parameters that ``reproduce --dry-run`` does not check, because it opens no file."""


def trials(world: Path, work: Path, count: int, draw: random.Random) -> Trials:
    """Yield ``count`` command lines, or all if there are fewer."""
    cases = list(_cases())
    for name, arguments, may_pass in draw.sample(cases, min(count, len(cases))):
        yield Trial(name, _judge(world, arguments, may_pass))


def _cases() -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Yield a name, a command line, and whether the command may accept the value."""
    parsers: Any = get_command(app)
    for name, command in parsers.commands.items():
        for parameter in command.params:
            kind = parameter.type_descriptor.annotation
            kinds = {kind, *get_args(kind)}
            argument = parameter.param_type_name == "argument"
            for value, may_pass in _values(parameter.name, kinds):
                spelled = (value,) if argument else (parameter.opts[-1], value)
                may_pass |= name == "reproduce" and parameter.name in _UNREAD
                before, after = _VALID[name]
                if argument:  # replaces the valid one
                    before, after = _AROUND[name, parameter.name]
                called = " ".join([name, *spelled[:-1], repr(value[:40])])
                yield called, (*before, *spelled, *after), may_pass


def _values(name: str, kinds: set[Any]) -> Iterator[tuple[str, bool]]:
    if int in kinds:
        yield from ((value, False) for value in _WHOLE)
    elif float in kinds:
        yield from ((value, value == "-1") for value in _FRACTIONS)
    elif str in kinds or Path in kinds:
        for value in _NONSENSE:
            yield value, name in _ANY or not value
        for place in _PLACES:
            yield place, name in _ANY or place == name


def _judge(
    world: Path, arguments: tuple[str, ...], may_pass: bool
) -> Callable[[Path], tuple[str, str] | None]:
    def judge(folder: Path) -> tuple[str, str] | None:
        copy_world(world, folder)
        os.mkfifo(folder / "pipe")
        os.mkfifo(folder / "s.toml")
        ran = run(arguments, folder)
        if ran.fault:
            return ran.fault, shown(ran)
        if ran.status or ran.warned or may_pass:
            return None
        return SILENT, f"accepted; {shown(ran)}"

    return judge
