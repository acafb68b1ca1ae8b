"""What the rows say, in sentences, whichever way it falls."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from accelkit.bench.report.findings import (
    BEHIND,
    EQUAL,
    EQUAL_TIME,
    FRONT,
    FULL,
    HIGHER,
    LOWER,
    NOISE,
    SAME,
    TIMING,
    Findings,
    Row,
    group,
    grouped,
    label,
    setting,
    verdict,
)
from accelkit.bench.report.formats import counted, listed, percent, significant
from accelkit.noise.axis import level_of_log_snr

Point = tuple[str, str]

_KINDS = {
    "full": "Full depth, fewer steps",
    "schedule": "Schedules",
    "baseline": "Caches, other baselines",
    "combination": "Combinations",
}
_PLACES = {
    FRONT: "On the Pareto front of time and FID",
    NOISE: "Behind it, but within the noise",
    TIMING: "Within the timing noise of it",
    BEHIND: "Behind it",
}
_EVEN = float(level_of_log_snr(np.zeros(())))
"""The noise level of as much noise as data."""
_VERDICTS = {
    LOWER: "Better than fewer steps",
    SAME: "As good as fewer steps",
    EQUAL: "As good as fewer steps",
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
    about = f"{sampler.upper()} {steps}"
    if full["fid"] is None:
        rows, without = [r for r in findings.of(sampler) if r["seconds"] is not None], ""
        rows = [row for row in rows if findings.base(row) is full]
    else:
        rows, without = findings.scored(sampler), " without a distinguishable loss of FID"
    rows = [row for row in rows if _surely_saves(findings, row, full)]
    kept = [r for r in rows if full["fid"] is None or verdict(r, full) != HIGHER]
    if not kept:
        text = f"Nothing saves time against full depth{without}."
        return [(about, text + (_cheapest_loss(findings, rows, full) if rows else ""))]
    best = max(kept, key=lambda row: findings.saved(row, full))
    named = label(best) + (f" in {best['steps']} steps" if best["steps"] != steps else "")
    text = f"{named} saves most{without}: {_said(findings, best, full, ' of the time')}"
    if full["fid"] is None:
        return [(about, f"{text}. Quality was not measured.")]
    how = {LOWER: "lower than", SAME: "not distinguishable from", EQUAL: "equal to"}
    fids = significant(best["fid"]), significant(full["fid"])
    which = how[verdict(best, full)]
    return [(about, f"{text}, at a FID of {fids[0]}, {which} full depth's {fids[1]}.")]


def _surely_saves(findings: Findings, row: Row, full: Row) -> bool:
    """Whether time is saved beyond the noise, where that is known."""
    paired = findings.base(row) is full and row["saving_interval"] is not None
    return (row["saving_interval"][0] if paired else findings.saved(row, full)) > 0


def _said(findings: Findings, row: Row, full: Row, of: str = "") -> str:
    text = f"{percent(findings.saved(row, full))}{of}"
    if findings.base(row) is not full or row["saving_interval"] is None:
        return text
    low, high = map(percent, row["saving_interval"])
    return f"{text} ({findings.interval} {low} to {high})"


def _cheapest_loss(findings: Findings, rows: list[Row], full: Row) -> str:
    """What loses least for the time it saves: of the smallest product of time and FID."""
    best = min(rows, key=lambda row: findings.seconds(row) * row["fid"])
    named = f"{best['steps']} steps" if label(best) == FULL else label(best)
    if label(best) != FULL and best["steps"] != full["steps"]:
        named += f" in {best['steps']} steps"
    saves = "save" if label(best) == FULL and best["steps"] > 1 else "saves"
    return (
        f" The cheapest loss, by time times FID: {named} {saves} {_said(findings, best, full)} "
        f"at FID {significant(best['fid'])} against {significant(full['fid'])}."
    )


def _fewer_steps(findings: Findings) -> list[Point]:
    found: dict[str, list[Row]] = {about: [] for about in _VERDICTS.values()}
    for sampler in findings.samplers:
        for row in findings.scored(sampler):
            other = findings.fewer_steps(row) if label(row) != FULL else None
            if other is not None:
                found[_VERDICTS[verdict(row, other)]].append(row)
    return [
        (about, f"At equal time (within {EQUAL_TIME:.0%}), by FID: {grouped(rows)}.")
        for about, rows in found.items()
        if rows
    ]


def _fronts(findings: Findings) -> list[Point]:
    """Of every kind of methods, what is on its sampler's front and what is behind."""
    scored = [row for sampler in findings.samplers for row in findings.scored(sampler)]
    points = []
    for kind, about in _KINDS.items():
        places: dict[str, list[Row]] = {where: [] for where in _PLACES}
        for row in scored:
            if group(row) == kind:
                places[findings.place(row)].append(row)
        texts = [f"{_PLACES[where]}: {grouped(rows)}." for where, rows in places.items() if rows]
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
    levels = protocol.get("first_levels", {})
    scored = [row for row in findings.rows if row["fid"] is not None]
    late = [setting(r) for r in scored if levels.get(f"{r['sampler']}:{r['steps']}", 1.0) < _EVEN]
    if late:
        texts.append(
            f"the figures of {listed(list(dict.fromkeys(late)))} mean nothing: as diffusers spaces "
            "the timesteps, the network is first called at the noise level of nearly clean images, "
            "on pure noise"
        )
    if any(row["fid"] is not None and not row["fid_jackknife"] for row in findings.rows):
        texts.append("some FIDs have no jackknife: their differences may be noise")
    return [("Caution", "; ".join(texts) + ".")] if texts else []


def _scored_at(findings: Findings, sampler: str, steps: int) -> list[Row]:
    return [row for row in findings.at(sampler, steps) if row["fid"] is not None]
