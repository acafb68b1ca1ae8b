"""Kills at random moments of every job, after which the advice of the messages is followed."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.reliability.advice import finish
from benchmarks.reliability.trial import Trial, Trials, run
from benchmarks.reliability.world import JOBS, Job, copy_world


def trials(world: Path, work: Path, count: int, draw: random.Random) -> Trials:
    """Yield ``count`` kills, of each job in turn.

    Half of them come before an operation that changes the disk, spread over the whole run, because
    each leaves the disk in another state. The others come after a random time.
    """
    undisturbed = {job.name: _undisturbed(job, world, work) for job in JOBS}
    each = -(-count // (2 * len(JOBS)))
    for number in range(count):
        job = JOBS[number % len(JOBS)]
        turn = number // len(JOBS)
        expected, writes, seconds = undisturbed[job.name]
        if turn % 2 == 0:
            at = int((turn // 2 + draw.random()) / each * writes) % writes
            yield _kill(world, job, expected, write=at)
        else:
            yield _kill(world, job, expected, seconds=draw.uniform(0, seconds))


def _undisturbed(job: Job, world: Path, work: Path) -> tuple[dict[str, str], int, float]:
    folder = work / f"undisturbed-{job.name}"
    copy_world(world, folder)
    ran = run(job.arguments, folder)
    if ran.status != 0:
        raise RuntimeError(f"accelkit {job.name} fails undisturbed: {ran.err[-500:]}")
    return job.result(folder / job.output), ran.writes, ran.seconds


def _kill(
    world: Path,
    job: Job,
    expected: dict[str, str],
    write: int | None = None,
    seconds: float | None = None,
) -> Trial:
    def judge(folder: Path) -> tuple[str, str] | None:
        copy_world(world, folder)
        kill_at = None if write is None else lambda number, _: number == write
        run(job.arguments, folder, kill_at=kill_at, kill_after=seconds)
        return finish(job, folder, expected)

    when = f"before write {write}" if seconds is None else f"after {seconds:.2f} s"
    return Trial(f"{job.name} killed {when}", judge)
