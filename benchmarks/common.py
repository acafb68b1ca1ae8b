"""Interleaved timing and records shared by the scripts."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelkit.bench.results import commit, machine
from accelkit.files.writing import write_json


def interleaved(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each piece of work, run A B C A B C after one round of warm-up."""
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> dict[str, Any]:
    """Return median and quartiles of the paired ratios ``name`` / ``base``."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": median,
        "quartiles": [low, high],
        "seconds": {n: statistics.median(seconds[n]) for n in (name, base)},
        "rounds": len(ratios),
    }


def record(
    module: str, protocol: dict[str, Any], results: dict[str, Any], path: str | None
) -> None:
    """Print results as JSON and, given a path, write them there with protocol and machine."""
    print(json.dumps(results, indent=2))
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m", module, *sys.argv[1:]])
        content = {"command": command, "protocol": protocol, "results": results}
        write_json(target, {**content, "machine": machine(), "commit": commit()})


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("-o", "--output", help="JSON file for the results")
    made.add_argument("--rounds", type=int, default=rounds)
    return made
