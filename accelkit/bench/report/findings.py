"""What the rows of a benchmark say when they are held against each other."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from accelkit.bench.report.formats import listed
from accelkit.metrics.quality import distinguishable

Row = dict[str, Any]

LOWER, HIGHER, SAME, EQUAL = "lower", "higher", "not distinguishable", "equal"
FRONT, NOISE, TIMING, BEHIND = "front", "noise", "timing noise", "behind"
FULL = "full depth"
EQUAL_TIME = 0.15
"""Share of the time that two rows may differ by to stand beside each other."""

_FULL_DEPTH = re.compile(r"full|steps(:\d+)?")
ASSURED = 6
"""Rounds from which the bootstrap of a median is an interval; of fewer it is about their range."""


def label(row: Row) -> str:
    """Return what a row's method is called, whatever its sampler and steps.

    Fewer steps are full depth: what sets them apart is the number of steps.
    """
    name = FULL if at_full_depth(row) else row["method"]
    return f"{name} tuned" if row["weights"] == "tuned" else name


def at_full_depth(row: Row) -> bool:
    """Return whether a row's method is full depth and nothing else, in whatever number of steps."""
    return _FULL_DEPTH.fullmatch(row["method"]) is not None


def group(row: Row) -> str:
    """Return the kind of methods that a row stands with: fewer steps with full depth."""
    return "full" if at_full_depth(row) else row["kind"]


def in_other_steps(row: Row) -> bool:
    """Return whether a row's method has a number of steps of its own.

    Its time saved is against full depth in the steps that the sampler was asked for.
    """
    return any(part.split(":")[0] == "steps" for part in row["method"].split("+"))


def setting(row: Row) -> str:
    """Return sampler and steps, ``DDIM 50``."""
    return f"{row['sampler'].upper()} {row['steps']}"


def grouped(rows: list[Row]) -> str:
    """Return rows in words, a method's settings together: ``D4 (DDIM 50 and DDIM 25), pab (…)``."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        methods.setdefault(label(row), []).append(setting(row))
    return listed([f"{name} ({listed(settings)})" for name, settings in methods.items()])


def verdict(row: Row, other: Row) -> str:
    """Return how ``row``'s FID stands to ``other``'s.

    Any difference counts where the noise is unknown, and where it is not of the same images: a
    loss must not pass for none.
    """
    if _compared(row) == _compared(other):
        return EQUAL
    if _paired(row, other) and not distinguishable(row, other):
        return SAME
    return LOWER if row["fid"] < other["fid"] else HIGHER


def _compared(row: Row) -> float:
    """Return a FID to four digits: the same images by other operators differ in later ones."""
    return float(f"{row['fid']:.4g}")


def _paired(row: Row, other: Row) -> bool:
    a, b = row["fid_jackknife"], other["fid_jackknife"]
    return bool(a and b) and len(a) == len(b) and row["images"] == other["images"]


class Findings:
    """The rows that ran, by sampler and steps.

    A row has one time wherever it is compared, :meth:`seconds`.

    A sampler's rows are compared over all its numbers of steps: full depth in fewer steps is an
    alternative to whatever makes a step cheaper.

    Attributes:
        rows: those that ran.
        skipped: those that did not.
        settings: the (sampler, steps) that were asked for, in order.
        interval: what the rows' saving intervals are, in words.
        samplers: the samplers among both, each once.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        protocol = results["protocol"]
        self._batch = protocol["timing"]["batch_size"]
        assured = protocol["timing"]["rounds"] >= ASSURED
        self.interval = "95% interval" if assured else "range"
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

    def at(self, sampler: str, steps: int) -> list[Row]:
        """Return the rows of a setting."""
        return [row for row in self.of(sampler) if row["steps"] == steps]

    def scored(self, sampler: str) -> list[Row]:
        """Return a sampler's rows that have a time and a FID."""
        return [r for r in self.of(sampler) if r["fid"] is not None and r["seconds"] is not None]

    def seconds(self, row: Row) -> float:
        """Return seconds per image: full depth's, less the share of them that the row saves.

        The saving is of paired rounds and so the better known; without one it is the row's median.
        """
        base = self.base(row)
        if base is None or row["saving"] is None or base["seconds"] is None:
            return row["seconds"] / self._batch
        return base["seconds"] * (1 - row["saving"]) / self._batch

    def seconds_interval(self, row: Row) -> tuple[float, float] | None:
        """Return the seconds per image that the interval of the saving leaves open."""
        base = self.base(row)
        if base is None or row["saving_interval"] is None or base["seconds"] is None:
            return None
        low, high = row["saving_interval"]
        scale = base["seconds"] / self._batch
        return scale * (1 - high), scale * (1 - low)

    def full(self, sampler: str, steps: int) -> Row | None:
        """Return the row of full depth at a setting, in the steps that were asked for."""
        return self._full.get((sampler, steps))

    def base(self, row: Row) -> Row | None:
        """Return full depth as the row's saving is measured against, None if it did not run.

        For other steps that is the setting they were asked for under. The multiply-adds tell it;
        without them it is taken to be the next above.
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
        """Return the share of full depth's time that a row saves, whatever its steps."""
        if row["saving"] is not None and self.base(row) is full:
            return row["saving"]
        return 1 - self.seconds(row) / self.seconds(full)

    def front(self, sampler: str) -> list[Row]:
        """Return the Pareto front of seconds and FID, fastest first.

        A row is on it if no other takes at most its time with at most its FID, one of them less.
        """
        return self._fronts[sampler]

    def on_front(self, row: Row) -> bool:
        """Return whether a row is on its sampler's front."""
        return any(row is other for other in self.front(row["sampler"]))

    def beaten_by(self, row: Row) -> Row | None:
        """Return the row of lowest FID among those at least as fast and good; None on the front.

        One whose lead is beyond the noise of time and FID goes before those whose lead is not.
        """
        rivals = [r for r in self.scored(row["sampler"]) if self._dominates(r, row)]
        return min(
            rivals,
            key=lambda r: (self._lead(r, row) != BEHIND, r["fid"], self.seconds(r)),
            default=None,
        )

    def place(self, row: Row) -> str:
        """Return where a row stands: on the front, behind, or behind by no more than noise."""
        rival = self.beaten_by(row)
        return FRONT if rival is None else self._lead(rival, row)

    def fewer_steps(self, row: Row) -> Row | None:
        """Return full depth in fewer steps of about the same time, None if it was not run.

        Of several the nearest that is no faster than the row, if there is one.
        """
        time = self.seconds(row)
        rivals = [
            r
            for r in self.scored(row["sampler"])
            if label(r) == FULL and r["steps"] < row["steps"] and self.seconds(r) > 0 < time
        ]
        ratios = {id(r): self.seconds(r) / time for r in rivals}
        near = [r for r in rivals if abs(np.log(ratios[id(r)])) <= np.log(1 + EQUAL_TIME)]
        return min(
            near, key=lambda r: (ratios[id(r)] < 1, abs(np.log(ratios[id(r)]))), default=None
        )

    def parts(self, row: Row) -> list[Row] | None:
        """Return the rows of what a combination is made of, None unless each was run alone.

        All have to be measured against the same full depth.
        """
        at = self.at(row["sampler"], row["steps"])
        base = self.base(row)
        same = [r for r in at if r["weights"] == row["weights"] and self.base(r) is base]
        found = [r for part in row["method"].split("+") for r in same if r["method"] == part]
        return found if len(found) == len(row["method"].split("+")) else None

    def _front(self, rows: list[Row]) -> list[Row]:
        kept = [row for row in rows if not any(self._dominates(other, row) for other in rows)]
        return sorted(kept, key=lambda row: (self.seconds(row), row["fid"]))

    def _dominates(self, a: Row, b: Row) -> bool:
        times = self.seconds(a), self.seconds(b)
        fids = _compared(a), _compared(b)
        no_worse = times[0] <= times[1] and fids[0] <= fids[1]
        return no_worse and (times[0] < times[1] or fids[0] < fids[1])

    def _lead(self, rival: Row, row: Row) -> str:
        """How sure it is that a row is behind one that is no slower and no worse."""
        if verdict(rival, row) == SAME:
            return NOISE
        times = self.seconds_interval(rival), self.seconds_interval(row)
        if times[0] is None or times[1] is None or times[0][1] < times[1][0]:
            return BEHIND
        return TIMING
