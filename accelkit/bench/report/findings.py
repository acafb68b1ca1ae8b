"""How the rows of a benchmark compare with each other."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from accelkit.bench.report.document import enumerated
from accelkit.metrics.quality import distinguishable

Row = dict[str, Any]

LOWER, HIGHER, SAME, EQUAL = "lower", "higher", "not distinguishable", "equal"
FULL = "full depth"
EQUAL_TIME = 0.15
"""Largest relative difference between two times that count as equal."""
ENOUGH_ROUNDS = 6
"""Rounds needed for a 95% bootstrap interval of a median; with fewer it is about their range."""

_FULL_DEPTH = re.compile(r"full|steps(:\d+)?")


def label(row: Row) -> str:
    """Return the name of a row's method, without sampler and steps.

    Fewer steps are called full depth, because the number of steps is all that differs.
    """
    name = FULL if at_full_depth(row) else row["method"]
    return f"{name} tuned" if row["weights"] == "tuned" else name


def at_full_depth(row: Row) -> bool:
    """Return whether a row's method is full depth and nothing else, in any number of steps."""
    return _FULL_DEPTH.fullmatch(row["method"]) is not None


def group(row: Row) -> str:
    """Return the kind of a row's method, where fewer steps belong to full depth."""
    return "full" if at_full_depth(row) else row["kind"]


def in_other_steps(row: Row) -> bool:
    """Return whether a row's method sets its own number of steps.

    Its time saved is measured against full depth in the sampler's number of steps.
    """
    return any(part.split(":")[0] == "steps" for part in row["method"].split("+"))


def setting(row: Row) -> str:
    """Return sampler and steps, as in ``DDIM 50``."""
    return f"{row['sampler'].upper()} {row['steps']}"


def grouped(rows: list[Row]) -> str:
    """Return the rows in words, by method: ``D4 (DDIM 50 and DDIM 25), pab (…)``."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        methods.setdefault(label(row), []).append(setting(row))
    return enumerated([f"{name} ({enumerated(settings)})" for name, settings in methods.items()])


def verdict(row: Row, other: Row) -> str:
    """Return how ``row``'s FID compares with ``other``'s.

    Any difference counts if the noise is unknown or the numbers of images differ, so that a loss
    is never taken for noise.
    """
    if _rounded_fid(row) == _rounded_fid(other):
        return EQUAL
    if _paired(row, other) and not distinguishable(row, other):
        return SAME
    return LOWER if row["fid"] < other["fid"] else HIGHER


def _rounded_fid(row: Row) -> float:
    """Return the FID to four digits, because different kernels change later ones."""
    return float(f"{row['fid']:.4g}")


def _paired(row: Row, other: Row) -> bool:
    a, b = row["fid_jackknife"], other["fid_jackknife"]
    return bool(a and b) and len(a) == len(b) and row["images"] == other["images"]


class Findings:
    """The rows that ran, by sampler and steps.

    Rows are compared by the time that :meth:`seconds` returns, and over all numbers of steps of
    their sampler: full depth in fewer steps is an alternative to cheaper steps.

    Attributes:
        rows: the rows that ran.
        skipped: the rows that did not run.
        settings: the pairs (sampler, steps) asked for, in order.
        interval: the kind of interval that the rows have, in words.
        samplers: the samplers of settings and rows, each once.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        protocol = results["protocol"]
        self._batch = protocol["timing"]["batch_size"]
        enough = protocol["timing"]["rounds"] >= ENOUGH_ROUNDS
        self.interval = "95% interval" if enough else "range"
        self.rows: list[Row] = [row for row in results["rows"] if row["skipped"] is None]
        self.skipped: list[Row] = [row for row in results["rows"] if row["skipped"] is not None]
        self._full = {
            (row["sampler"], row["steps"]): row
            for row in self.rows
            if row["method"] == "full" and row["weights"] == "original"
        }
        pairs = [text.split(":") for text in protocol["samplers"]]
        self.settings: list[tuple[str, int]] = [(name, int(steps)) for name, steps in pairs]
        named = [name for name, _ in self.settings] + [row["sampler"] for row in self.rows]
        self.samplers = list(dict.fromkeys(named))
        self._fronts = {name: self._front(self.scored(name)) for name in self.samplers}

    def of(self, sampler: str) -> list[Row]:
        """Return a sampler's rows."""
        return [row for row in self.rows if row["sampler"] == sampler]

    def scored(self, sampler: str) -> list[Row]:
        """Return a sampler's rows that have a time and a FID."""
        return [r for r in self.of(sampler) if r["fid"] is not None and r["seconds"] is not None]

    def seconds(self, row: Row) -> float:
        """Return seconds per image: full depth's, less the share that the row saves.

        Savings come from paired rounds, so they are more precise than the row's own median, which
        is used where there is no saving.
        """
        base = self.base(row)
        if base is None or row["saving"] is None or base["seconds"] is None:
            return row["seconds"] / self._batch
        return base["seconds"] * (1 - row["saving"]) / self._batch

    def seconds_interval(self, row: Row) -> tuple[float, float] | None:
        """Return the interval of :meth:`seconds` that follows from that of the saving."""
        base = self.base(row)
        if base is None or row["saving_interval"] is None or base["seconds"] is None:
            return None
        low, high = row["saving_interval"]
        scale = base["seconds"] / self._batch
        return scale * (1 - high), scale * (1 - low)

    def full(self, sampler: str, steps: int) -> Row | None:
        """Return full depth at a setting that was asked for."""
        return self._full.get((sampler, steps))

    def base(self, row: Row) -> Row | None:
        """Return the full depth that a row's saving is measured against, None if it did not run.

        A method in other steps is measured against the setting it was asked for under. That follows
        from the multiply-adds saved; without them it is the setting with the next more steps.
        """
        sampler, steps = row["sampler"], row["steps"]
        if not in_other_steps(row):
            return self.full(sampler, steps)
        if at_full_depth(row) and row["ideal_saving"] is not None and row["ideal_saving"] < 1:
            asked = self.full(sampler, round(steps / (1 - row["ideal_saving"])))
            if asked is not None:
                return asked
        above = [s for name, s in self.settings if name == sampler and s >= steps]
        found = [self.full(sampler, s) for s in sorted(above, key=lambda s: (s == steps, s))]
        return next((full for full in found if full is not None), None)

    def saved(self, row: Row, full: Row) -> float:
        """Return the share of full depth's time that a row saves, in any number of steps."""
        if row["saving"] is not None and self.base(row) is full:
            return row["saving"]
        return 1 - self.seconds(row) / self.seconds(full)

    def front(self, sampler: str) -> list[Row]:
        """Return the Pareto front of seconds and FID, fastest first.

        A row is on it unless another row has at most its time and its FID, and less of one of them.
        """
        return self._fronts[sampler]

    def on_front(self, row: Row) -> bool:
        """Return whether a row is on its sampler's front."""
        return any(row is other for other in self.front(row["sampler"]))

    def same_time(self, row: Row) -> Row | None:
        """Return full depth in fewer steps that takes about a row's time, None if it did not run.

        Of several it is the nearest that is no faster than the row, if there is one.
        """
        time = self.seconds(row)
        ratios = [
            (self.seconds(other) / time, other)
            for other in self.scored(row["sampler"])
            if label(other) == FULL
            and other["steps"] < row["steps"]
            and self.seconds(other) > 0 < time
        ]
        near = [
            (ratio < 1, abs(np.log(ratio)), other)
            for ratio, other in ratios
            if abs(np.log(ratio)) <= np.log(1 + EQUAL_TIME)
        ]
        return min(near, key=lambda found: found[:2])[-1] if near else None

    def same_quality(self, row: Row) -> Row | None:
        """Return the fastest full depth whose FID is not higher than a row's, None without one."""
        rivals = [other for other in self.scored(row["sampler"]) if label(other) == FULL]
        as_good = [other for other in rivals if verdict(other, row) != HIGHER]
        return min(as_good, key=self.seconds, default=None)

    def _front(self, rows: list[Row]) -> list[Row]:
        kept = [row for row in rows if not any(self._dominates(other, row) for other in rows)]
        return sorted(kept, key=lambda row: (self.seconds(row), row["fid"]))

    def _dominates(self, a: Row, b: Row) -> bool:
        times = self.seconds(a), self.seconds(b)
        fids = _rounded_fid(a), _rounded_fid(b)
        no_worse = times[0] <= times[1] and fids[0] <= fids[1]
        return no_worse and (times[0] < times[1] or fids[0] < fids[1])
