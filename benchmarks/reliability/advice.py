"""A simulated user who follows the advice of the messages."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from benchmarks.reliability.trial import DEAD_END, SILENT, run, shown
from benchmarks.reliability.world import Job, differences

_ROUNDS = 8


def finish(job: Job, folder: Path, expected: dict[str, str]) -> tuple[str, str] | None:
    """Run a command, then the commands that its messages advise, until one succeeds.

    Returns:
        The first fault; ``DEAD_END`` if no advised command succeeds; ``SILENT`` if the result
        differs from that of an undisturbed run and no message warned of it.
    """
    ways, tried, warned = [job.arguments], [], False
    while ways and len(tried) < _ROUNDS:
        ran = run(arguments := ways.pop(0), folder)
        tried.append(shown(ran))
        if ran.fault:
            return ran.fault, " > ".join(tried)
        warned |= ran.warned
        if ran.status == 0:
            wrong = differences(job.result(folder / job.output), expected)
            ends = f"{', '.join(wrong[:3])} differ; {' > '.join(tried)}"
            return (SILENT, ends) if wrong and not warned else None
        advised = _advised(ran.messages[0], job, arguments, folder)
        ways = [*advised, *(way for way in ways if way not in advised)]
    return DEAD_END, " > ".join(tried)


def _advised(
    message: str, job: Job, arguments: tuple[str, ...], folder: Path
) -> list[tuple[str, ...]]:
    """Return the commands that a message advises, after removing what it says to remove."""
    found = []
    if "remove " in message and (path := _named(message, folder)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        found.append(arguments)
    if "again" in message:
        found.append(arguments)
    if "leave --resume out" in message:
        found.append(job.arguments)
    for option in (("--resume", "latest"), ("--overwrite",)):
        if " ".join(option) in message and option[0] not in arguments:
            found.append((*job.arguments, *option))
    return found


def _named(message: str, folder: Path) -> Path | None:
    """Return the path in a trial's folder that a message names next to the word "remove"."""
    before, _, after = message.partition("remove ")
    for word in re.findall(r"[\w./-]+", after) + re.findall(r"[\w./-]+", before):
        path = (folder / word.strip(".")).resolve()
        if path.exists() and folder.resolve() in path.parents:
            return path
    return None
