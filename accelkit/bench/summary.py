"""What the rows say, in sentences, whichever way it falls."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from accelkit.bench.findings import (
    FULL,
    HIGHER,
    LOWER,
    SAME,
    Findings,
    Row,
    grouped,
    label,
    setting,
    verdict,
)
from accelkit.bench.formats import counted, listed, percent, significant

Point = tuple[str, str]

_KINDS = {
    "full": "Full depth, fewer steps",
    "schedule": "Schedules",
    "baseline": "Caches, other baselines",
    "combination": "Combinations",
}
_PLACES = (
    "On the Pareto front of time and FID",
    "Behind it, but within the noise",
    "Behind it",
)
_EQUAL_TIME = {
    LOWER: "Better than fewer steps",
    SAME: "As good as fewer steps",
    HIGHER: "Worse than fewer steps",
}


def summary(results: dict[str, Any], findings: Findings) -> list[Point]:
    """Return the main findings and what to know of them, each with what it is about."""
    points: list[Point] = []
    for sampler, steps in findings.settings:
        points += _best_saving(findings, sampler, steps)
    points += _fewer_steps(findings)
    points += _skipped(findings)
    points += _cautions(results, findings)
    return points


def standings(findings: Findings) -> list[Point]:
    """Return where each kind of methods stands, and what combinations give."""
    return _fronts(findings) + _combinations(findings)


def _best_saving(findings: Findings, sampler: str, steps: int) -> list[Point]:
    """What saves most of a setting's full depth, fewer steps included."""
    full = findings.full(sampler, steps)
    if full is None or not full["seconds"] or len(findings.of(sampler)) == 1:
        return []
    if full["fid"] is None:
        rows, without = [r for r in findings.at(sampler, steps) if r["seconds"] is not None], ""
    else:
        rows = [row for row in findings.scored(sampler) if verdict(row, full) != HIGHER]
        without = " without a distinguishable loss of FID"
    about = f"{sampler.upper()} {steps}"
    best = max(rows, key=lambda row: _saved(row, full))
    if _saved(best, full) <= 0:
        return [(about, f"Nothing saves time against full depth{without}.")]
    named = label(best) + (f" in {best['steps']} steps" if best["steps"] != steps else "")
    text = f"{named} saves most{without}: {percent(_saved(best, full))} of the time"
    if full["fid"] is None:
        return [(about, f"{text}. Quality was not measured.")]
    how = {LOWER: "lower than", SAME: "not distinguishable from"}[verdict(best, full)]
    fids = significant(best["fid"]), significant(full["fid"])
    return [(about, f"{text}, at a FID of {fids[0]}, {how} full depth's {fids[1]}.")]


def _saved(row: Row, full: Row) -> float:
    """Share of full depth's time saved: of paired rounds where there are any, as tables show it."""
    if row["steps"] == full["steps"] and row["saving"] is not None:
        return row["saving"]
    return 1 - row["seconds"] / full["seconds"]


def _fewer_steps(findings: Findings) -> list[Point]:
    found: dict[str, list[Row]] = {which: [] for which in _EQUAL_TIME}
    for sampler in findings.samplers:
        for row in findings.scored(sampler):
            other = findings.fewer_steps(row) if label(row) != FULL else None
            if other is not None:
                found[verdict(row, other)].append(row)
    return [
        (about, f"At equal time, by FID: {grouped(found[which])}.")
        for which, about in _EQUAL_TIME.items()
        if found[which]
    ]


def _fronts(findings: Findings) -> list[Point]:
    """Of every kind of methods, what is on its sampler's front and what is behind."""
    scored = [row for sampler in findings.samplers for row in findings.scored(sampler)]
    points = []
    for kind, about in _KINDS.items():
        rows = [row for row in scored if row["kind"] == kind]
        places: dict[str, list[Row]] = {where: [] for where in _PLACES}
        for row in rows:
            rival = findings.beaten_by(row)
            noise = rival is not None and verdict(rival, row) == SAME
            places[_PLACES[0] if rival is None else _PLACES[1] if noise else _PLACES[2]].append(row)
        texts = [f"{where}: {grouped(found)}." for where, found in places.items() if found]
        if texts:
            points.append((about, " ".join(texts)))
    return points if len(scored) > 1 else []


def _combinations(findings: Findings) -> list[Point]:
    texts: dict[str, list[str]] = {}
    for row in findings.rows:
        parts = findings.parts(row) if row["kind"] == "combination" else None
        if not parts or any(r["saving"] is None for r in [row, *parts]):
            continue
        alone = listed([f"{part['method']} {percent(part['saving'])}" for part in parts])
        text = f"{percent(row['saving'])} saved with {setting(row)}, alone {alone}"
        if all(r["fid"] is not None for r in [row, *parts]):
            fids = listed([significant(part["fid"]) for part in parts])
            text += f"; FID {significant(row['fid'])}, alone {fids}"
        texts.setdefault(label(row), []).append(f"{text}.")
    return [(name, " ".join(said)) for name, said in texts.items()]


def _skipped(findings: Findings) -> list[Point]:
    reasons: dict[str, list[Row]] = {}
    for row in findings.skipped:
        reasons.setdefault(row["skipped"], []).append(row)
    return [("Skipped", f"{grouped(rows)}: {reason}.") for reason, rows in reasons.items()]


def _cautions(results: dict[str, Any], findings: Findings) -> list[Point]:
    protocol = results["protocol"]
    images, extractor = protocol["images"], protocol["extractor"]
    if extractor is None:
        return [("Quality", "Not measured: no feature extractor was given for this data.")]
    texts = []
    if images <= extractor["dim"]:
        texts.append(
            f"{counted(images, 'image')} per row do not determine a covariance of "
            f"{extractor['dim']:,} features: read no FID here for itself"
        )
    pairs = [
        pair
        for sampler, steps in findings.settings
        for pair in combinations(_scored_at(findings, sampler, steps), 2)
    ]
    tied = sum(verdict(a, b) == SAME for a, b in pairs)
    if tied:
        texts.append(
            f"{images:,} images per row are too few to tell {tied:,} of "
            f"{counted(len(pairs), 'pair')} of methods apart by FID"
        )
    if any(row["fid"] is not None and not row["fid_jackknife"] for row in findings.rows):
        texts.append("some FIDs have no jackknife: their differences may be noise")
    return [("Caution", "; ".join(texts) + ".")] if texts else []


def _scored_at(findings: Findings, sampler: str, steps: int) -> list[Row]:
    return [row for row in findings.at(sampler, steps) if row["fid"] is not None]
