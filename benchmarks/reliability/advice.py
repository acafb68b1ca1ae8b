"""A user who does what the messages say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from benchmarks.reliability.trial import DEAD_END, SILENT, Ran, run, shown
from benchmarks.reliability.world import Job, differences

_ROUNDS = 6


def finish(job: Job, folder: Path, expected: dict[str, str]) -> tuple[str, str] | None:
    """Bring a command to its end by following its messages, beginning with the plain command.

    Returns:
        The first fault on the way, ``DEAD_END`` if advice repeats itself without an end, or
        ``SILENT`` if the end differs from what an undisturbed run leaves, without a word of it.
    """
    arguments, tried, told = list(job.arguments), [], False
    for _ in range(_ROUNDS):
        ran = run(arguments, folder)
        tried.append(shown(ran))
        if ran.fault:
            return ran.fault, " > ".join(tried)
        told |= ran.warned
        if ran.status == 0:
            wrong = differences(job.result(folder / job.output), expected)
            ends = f"{', '.join(wrong[:3])} differ; {' > '.join(tried)}"
            return (SILENT, ends) if wrong and not told else None
        if (arguments := _advised(ran, job, arguments, folder)) is None:
            break
    return DEAD_END, " > ".join(tried)


def _advised(ran: Ran, job: Job, arguments: list[str], folder: Path) -> list[str] | None:
    """Return the command that a message leads to, None if it leads to none."""
    message = ran.messages[0]
    if "leave --resume out" in message and "--resume" in arguments:
        return list(job.arguments)
    if "remove " in message and (named := _named(message, folder)):
        shutil.rmtree(named) if named.is_dir() else named.unlink()
        return arguments
    if "--resume latest" in message and "--resume" not in arguments:
        return [*job.arguments, "--resume", "latest"]
    if "--overwrite" in message and "--overwrite" not in arguments:
        return [*job.arguments, "--overwrite"]
    if "again" in message:
        return arguments
    return None


def _named(message: str, folder: Path) -> Path | None:
    """Return the first thing in a trial's folder that a message names, and that may be removed."""
    for word in re.findall(r"[\w./-]+", message):
        path = (folder / word.rstrip(".")).resolve()
        if path.exists() and path.is_relative_to(folder.resolve()) and path != folder.resolve():
            return path
    return None
