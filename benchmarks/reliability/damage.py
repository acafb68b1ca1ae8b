"""Damaged files: of checkpoints, of fine-tuned models and of caches."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.reliability.advice import finish
from benchmarks.reliability.trial import SILENT, Event, Trial, Trials, run, shown
from benchmarks.reliability.world import BENCH, FINETUNE, SAMPLE, Job, copy_world, differences

_BLOCK = 4096

Place = tuple[Job, Path, Path, dict[str, str]]
"""A job, the folder of its run, a file there, and the result of an undisturbed run."""


def _flip(content: bytes, draw: random.Random) -> bytes:
    place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def _zero(content: bytes, draw: random.Random) -> bytes:
    size = min(_BLOCK, -(-len(content) // 2))
    starts = range(0, len(content) - size + 1, max(1, size // 8))
    filled = [s for s in starts if any(content[s : s + size])]  # zeroing zeros is no damage
    start = draw.choice(filled or [0])
    return content[:start] + bytes(size) + content[start + size :]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


_WAYS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flipped": _flip,
    "a block of zeros": _zero,
    "cut short": _cut,
}


def checkpoints(world: Path, work: Path, count: int, draw: random.Random) -> Trials:
    """Yield ``count`` trials that damage a file of a killed fine-tuning, or of a finished one."""
    whole, killed = work / "finished", work / "killed"
    for folder in (whole, killed):
        copy_world(world, folder)
    expected = _result(FINETUNE, whole)
    tuned = replace(SAMPLE, arguments=("sample", "--model", "tuned", *SAMPLE.arguments[3:]))
    pictures = _result(tuned, whole)
    run(FINETUNE.arguments, killed, kill_at=_after("step-00000003"))
    places: list[Place] = [
        (FINETUNE, killed, path, expected) for path in _files(killed / FINETUNE.output)
    ]
    for name in ("accelkit.json", "accelkit.safetensors"):
        places.append((tuned, whole, whole / FINETUNE.output / name, pictures))
    yield from _spread(places, count, draw)


def caches(world: Path, work: Path, count: int, draw: random.Random) -> Trials:
    """Yield ``count`` trials that damage a file of a cache."""
    judged = replace(  # with the features of the digits
        BENCH, arguments=("bench", *BENCH.arguments[5:-1], "judged"), output="judged"
    )
    kinds = (
        (FINETUNE, "cache/latents"),
        (BENCH, f"{BENCH.output}/cells"),
        (judged, "cache/features"),
    )
    for index, (job, kept) in enumerate(kinds):
        if share := len(range(index, count, len(kinds))):
            folder = work / f"cached-{index}"
            copy_world(world, folder)
            expected = _result(job, folder)
            if not kept.startswith(job.output):
                shutil.rmtree(folder / job.output)
            places: list[Place] = [(job, folder, p, expected) for p in _files(folder / kept)]
            yield from _spread(places, share, draw)


def _after(name: str) -> Callable[[int, Event], bool]:
    """Return a condition that is true at the first write after a folder was renamed to ``name``."""
    done = False

    def at(_: int, event: Event) -> bool:
        nonlocal done
        if done:
            return True
        kind, arguments = event
        done = kind == "os.rename" and str(arguments[1]).endswith(name)
        return False

    return at


def _result(job: Job, folder: Path) -> dict[str, str]:
    ran = run(job.arguments, folder)
    if ran.status != 0:
        raise RuntimeError(f"accelkit {job.name} fails undisturbed: {ran.err[-500:]}")
    return job.result(folder / job.output)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def _spread(places: list[Place], count: int, draw: random.Random) -> Trials:
    """Yield ``count`` trials; every place is damaged in one way before any in a second way."""
    ways = list(_WAYS)
    order = draw.sample(places, len(places))
    for number in range(count):
        turn, which = divmod(number, len(order))
        yield _damage(*order[which], ways[(turn + which) % len(ways)], draw.randrange(2**32))


def _damage(
    job: Job, origin: Path, path: Path, expected: dict[str, str], way: str, seed: int
) -> Trial:
    inside = path.relative_to(origin)

    def judge(folder: Path) -> tuple[str, str] | None:
        shutil.copytree(origin, folder, dirs_exist_ok=True)
        file = folder / inside
        file.write_bytes(_WAYS[way](file.read_bytes(), random.Random(seed)))
        if job.name != "sample":
            return finish(job, folder, expected)
        shutil.rmtree(folder / job.output)
        ran = run(job.arguments, folder)
        if ran.fault:
            return ran.fault, shown(ran)
        if ran.status or ran.warned:
            return None
        wrong = differences(job.result(folder / job.output), expected)
        return (SILENT, f"{len(wrong)} images differ; {shown(ran)}") if wrong else None

    return Trial(f"{job.name} with {inside}, {way}", judge)
