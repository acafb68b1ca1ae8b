"""Count the faults that kills, damaged files, hostile files and bad values cause.

All four columns should be 0. A fault is shown with its number, and --only repeats that trial.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.reliability import commands, damage, hostile, kills, trial, world
from benchmarks.reliability.trial import FAULTS, Trials

KINDS: dict[str, tuple[str, Callable[[Path, Path, int, random.Random], Trials]]] = {
    "kills": ("kills of fine-tunings, benches, samplings and trainings", kills.trials),
    "damaged": ("damaged files of checkpoints and fine-tuned models", damage.checkpoints),
    "caches": ("damaged files of caches", damage.caches),
    "hostile": ("hostile files", hostile.trials),
    "commands": ("command lines with a bad value", commands.trials),
}


def main() -> None:
    parser = common.parser(__doc__, rounds=1)
    for kind, (what, _) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="N", help=what)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one trial of each kind")
    options = parser.parse_args()
    trial.prepare()
    results = {}
    with tempfile.TemporaryDirectory(prefix="accelkit-reliability-") as place:
        folder = Path(place)
        world.build(folder / "world")
        for kind in KINDS:
            if count := getattr(options, kind):
                found = list(_tried(kind, count, folder, options))
                faults = [row for row in found if row["fault"]]
                kinds = Counter(row["fault"] for row in faults)
                counted = {name: kinds[name] for name in FAULTS}
                results[kind] = {"trials": len(found), **counted, "faults": faults}
    print(_table(results))
    protocol = {"seed": options.seed, "seconds until a hang": trial.SECONDS}
    common.record("benchmarks.reliability", protocol, results, options.output)


def _tried(kind: str, count: int, folder: Path, options: Any) -> Iterator[dict[str, Any]]:
    work = folder / kind
    work.mkdir()
    trials = KINDS[kind][1](folder / "world", work, count, random.Random(options.seed))
    for number, one in enumerate(trials):
        if options.only not in (None, number):
            continue
        with tempfile.TemporaryDirectory(dir=work) as own:
            fault, shown = one.judge(Path(own)) or (None, "")
        if fault:
            print(f"{kind} {number}: {fault}: {one.name}: {shown}", flush=True)
        yield {"number": number, "trial": one.name, "fault": fault, "shown": shown}


def _table(results: dict[str, Any]) -> str:
    columns = ("trials", *FAULTS)
    lines = [f"{'':10}" + "".join(f"{name:>11}" for name in columns)]
    for kind, found in results.items():
        lines.append(f"{kind:10}" + "".join(f"{found[name]:>11}" for name in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
