"""What the rows of a benchmark say when they are held against each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from accelkit.bench.formats import listed
from accelkit.metrics.quality import distinguishable

Row = dict[str, Any]

LOWER, HIGHER, SAME = "lower", "higher", "not distinguishable"
FULL = "full depth"
_EQUAL = 0.15  # of the time: what two rows may differ by to stand beside each other


def label(row: Row) -> str:
    """Return what a row's method is called, whatever its sampler and steps.

    Fewer steps are full depth: what sets them apart is the number of steps.
    """
    name = FULL if row["method"].split(":")[0] in ("full", "steps") else row["method"]
    return f"{name} tuned" if row["weights"] == "tuned" else name


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

    Any difference counts where the noise is unknown: a loss must not pass for none.
    """
    known = row["fid_jackknife"] and other["fid_jackknife"]
    if row["fid"] == other["fid"] or (known and not distinguishable(row, other)):
        return SAME
    return LOWER if row["fid"] < other["fid"] else HIGHER


class Findings:
    """The rows that ran, by sampler and steps.

    A sampler's rows are compared over all its numbers of steps: full depth in fewer steps is an
    alternative to whatever makes a step cheaper.

    Attributes:
        rows: those that ran.
        skipped: those that did not.
        settings: the (sampler, steps) that were asked for, in order.
        samplers: the samplers among both, each once.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        protocol = results["protocol"]
        self._batch = protocol["timing"]["batch_size"]
        self.rows: list[Row] = [row for row in results["rows"] if row["skipped"] is None]
        self.skipped: list[Row] = [row for row in results["rows"] if row["skipped"] is not None]
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
        """Return seconds per image."""
        return row["seconds"] / self._batch

    def full(self, sampler: str, steps: int) -> Row | None:
        """Return the row of full depth at a setting."""
        return next((row for row in self.at(sampler, steps) if label(row) == FULL), None)

    def front(self, sampler: str) -> list[Row]:
        """Return the Pareto front of seconds and FID, fastest first.

        A row is on it if no other takes at most its time with at most its FID, one of them less.
        """
        return self._fronts[sampler]

    def on_front(self, row: Row) -> bool:
        """Return whether a row is on its sampler's front."""
        return any(row is other for other in self.front(row["sampler"]))

    def beaten_by(self, row: Row) -> Row | None:
        """Return the row of lowest FID among those at least as fast and good; None on the front."""
        rivals = [r for r in self.scored(row["sampler"]) if _dominates(r, row)]
        return min(rivals, key=lambda r: (r["fid"], r["seconds"]), default=None)

    def fewer_steps(self, row: Row) -> Row | None:
        """Return full depth in fewer steps of about the same time, None if it was not run."""
        rivals = [
            r
            for r in self.scored(row["sampler"])
            if label(r) == FULL and r["steps"] < row["steps"] and r["seconds"] > 0
        ]
        if not rivals or not row["seconds"]:
            return None
        apart = {id(r): abs(np.log(r["seconds"] / row["seconds"])) for r in rivals}
        nearest = min(rivals, key=lambda r: apart[id(r)])
        return nearest if apart[id(nearest)] <= np.log(1 + _EQUAL) else None

    def parts(self, row: Row) -> list[Row] | None:
        """Return the rows of what a combination is made of, None unless each was run alone."""
        at = self.at(row["sampler"], row["steps"])
        same = [r for r in at if r["weights"] == row["weights"]]
        found = [r for part in row["method"].split("+") for r in same if r["method"] == part]
        return found if len(found) == len(row["method"].split("+")) else None

    def _front(self, rows: list[Row]) -> list[Row]:
        kept = [row for row in rows if not any(_dominates(other, row) for other in rows)]
        return sorted(kept, key=lambda row: (row["seconds"], row["fid"]))


def _dominates(a: Row, b: Row) -> bool:
    no_worse = a["seconds"] <= b["seconds"] and a["fid"] <= b["fid"]
    return no_worse and (a["seconds"] < b["seconds"] or a["fid"] < b["fid"])
