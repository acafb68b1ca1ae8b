"""The report's tables that compare: as papers do, by who wins where, at equal time."""

from __future__ import annotations

from math import prod
from typing import Any

from accelkit.bench.report import quoted
from accelkit.bench.report.document import MISSING, Cell, Column, Table
from accelkit.bench.report.findings import (
    BEHIND,
    EQUAL_TIME,
    FRONT,
    FULL,
    NOISE,
    TIMING,
    Findings,
    Row,
    grouped,
    in_other_steps,
    label,
    setting,
    verdict,
)
from accelkit.bench.report.formats import decimals, fixed, percent
from accelkit.bench.report.listings import why_missing

_PLACES = {
    FRONT: "on the front",
    NOISE: "behind, within the noise",
    TIMING: "within the timing noise",
    BEHIND: "behind",
}
TIME = (
    "A row's time is full depth's median at the setting that it was timed beside, less the share "
    "saved of it, which is of paired rounds; where there is no saving, the row's own median."
)


def papers(results: dict[str, Any], findings: Findings) -> Table:
    """Methods by samplers, a cell as papers give it: FID ± standard error (time saved)."""
    published = {at: [p for p in results["published"] if _at(p) == at] for at in findings.settings}
    columns = [Column("Method", False)]
    for at in findings.settings:
        columns.append(Column(_heading(at)))
        if published[at]:
            columns.append(Column(f"{_heading(at)}, published"))
    rows = [row for row in results["rows"] if _at(row) in findings.settings and _asked_for(row)]
    entries = [entry for of_it in published.values() for entry in of_it]
    names = dict.fromkeys(label(row) for row in rows)
    names |= dict.fromkeys(_beside(entry, names) for entry in entries)
    digits = min(decimals(row["fid"] for row in rows), 3)
    shown = quoted.as_printed(results["published"])
    body = []
    for name in names:
        ran = [row for row in rows if label(row) == name]
        of_it = [entry for entry in entries if _beside(entry, names) == name]
        several = quoted.several(of_it)
        for training in [None, *several]:
            cells = [Cell(name if training is None else f"{name}, {several[training]}")]
            for at in findings.settings:
                row = next((r for r in ran if _at(r) == at), None)
                cells.append(
                    _figure(row, results, findings, digits)
                    if training is None
                    else Cell(MISSING, "published alone")
                )
                if published[at]:
                    found = [p for p in of_it if _at(p) == at]
                    if several:
                        found = [p for p in found if p["setting"] == training]
                    none = "of several trainings, below" if several else "not published"
                    cells.append(
                        Cell("; ".join(shown(p) for p in found)) if found else Cell(MISSING, none)
                    )
            body.append(cells)
    notes = [
        "FID ± standard error, and in brackets the time saved against full depth of the same "
        "sampler and steps. Bold: on the Pareto front of seconds and FID.",
    ]
    return Table("Methods by samplers", columns, body, notes + quoted.notes(entries))


def where_each_wins(findings: Findings) -> Table | None:
    """Methods by samplers, a cell says whether something else is both faster and better.

    None where nothing has both a time and a FID.
    """
    if not any(findings.scored(sampler) for sampler in findings.samplers):
        return None
    body = []
    names = [label(r) for r in findings.rows if _asked_for(r) and _at(r) in findings.settings]
    for name in dict.fromkeys(names):
        cells = [Cell(name)]
        for at in findings.settings:
            at_it = [r for r in findings.at(*at) if _asked_for(r)]
            row = next((r for r in at_it if label(r) == name), None)
            cells.append(_standing(row, findings))
        body.append(cells)
    fewer = [_fewer(findings, at) for at in findings.settings]
    if any(cell.text != MISSING for cell in fewer):
        body.append([Cell("full depth in fewer steps"), *fewer])
    columns = [Column("Method", False)]
    columns += [Column(_heading(at), False, prose=True) for at in findings.settings]
    notes = [
        "Behind: the row named takes no longer and has no higher FID. Within the timing noise: "
        f"it does, but the {findings.interval}s of the two times overlap. Rows of a sampler are "
        "held against each other over all numbers of steps.",
        TIME,
    ]
    return Table("On the Pareto front of time and FID, or behind what", columns, body, notes)


def equal_time(findings: Findings) -> Table | None:
    """Beside every method, full depth in as many steps as take its time; None without any."""
    rows = [
        row
        for sampler in findings.samplers
        for row in findings.scored(sampler)
        if label(row) != FULL
    ]
    pairs = [(row, other) for row in rows if (other := findings.fewer_steps(row)) is not None]
    if not pairs:
        return None
    alone = [row for row in rows if findings.fewer_steps(row) is None]
    shown = [row for pair in pairs for row in pair]
    seconds = decimals(findings.seconds(row) for row in shown)
    digits = min(decimals(row["fid"] for row in shown), 3)
    body = []
    for row, other in pairs:
        body.append(
            [
                Cell(label(row)),
                Cell(setting(row)),
                Cell(fixed(findings.seconds(row), seconds)),
                Cell(fixed(row["fid"], digits)),
                Cell(str(other["steps"])),
                Cell(fixed(findings.seconds(other), seconds)),
                Cell(fixed(other["fid"], digits)),
                Cell(verdict(row, other)),
            ]
        )
    columns = [Column("Method", False), Column("Setting", False), Column("s per image")]
    columns += [Column("FID"), Column("Steps of full depth"), Column("its s per image")]
    columns += [Column("its FID"), Column("The method's FID is", False)]
    notes = [
        f"Equal time: within {EQUAL_TIME:.0%}; of several the nearest that is no faster than the "
        "method, if there is one.",
        TIME,
    ]
    if alone:
        notes.append(
            f"No full depth in fewer steps takes within {EQUAL_TIME:.0%} of: {grouped(alone)}."
        )
    return Table("Each method beside fewer steps that take the same time", columns, body, notes)


def combined(findings: Findings) -> Table | None:
    """What combinations save beside each of their parts; None unless parts were run alone."""
    found = [
        (row, parts)
        for row in findings.rows
        if row["kind"] == "combination" and (parts := findings.parts(row))
    ]
    if not found:
        return None
    digits = min(decimals(r["fid"] for row, parts in found for r in [row, *parts]), 3)
    body = []
    for row, parts in found:
        savings = [part["saving"] for part in parts]
        body.append(
            [
                Cell(label(row)),
                Cell(setting(row)),
                _saved(row),
                Cell(", ".join(f"{part['method']} {_saved(part).text}" for part in parts)),
                Cell(MISSING, "a part's saving was not measured")
                if None in savings
                else Cell(percent(1 - prod(1 - saving for saving in savings))),
                _fid(row, digits),
                Cell(", ".join(f"{part['method']} {_fid(part, digits).text}" for part in parts)),
            ]
        )
    columns = [Column("Combination", False), Column("Setting", False), Column("Time saved")]
    columns += [Column("by its parts alone", False), Column("if they multiplied")]
    if all(row["fid"] is None for row, _ in found):
        return Table("What combinations give", columns, [cells[:5] for cells in body])
    columns += [Column("FID"), Column("of its parts alone", False)]
    return Table("What combinations give", columns, body)


def _saved(row: Row) -> Cell:
    if row["saving"] is None:
        return Cell(MISSING, "not measured")
    return Cell(percent(row["saving"]))


def _fid(row: Row, digits: int) -> Cell:
    if row["fid"] is None:
        return Cell(MISSING, "not measured")
    return Cell(fixed(row["fid"], digits))


def _asked_for(row: Row) -> bool:
    """Whether a row runs in the sampler's steps, which its saving is then against."""
    return not in_other_steps(row)


def _at(row: dict[str, Any]) -> tuple[str, int]:
    return row["sampler"], row["steps"]


def _heading(at: tuple[str, int]) -> str:
    return f"{at[0].upper()} {at[1]}"


def _beside(entry: dict[str, Any], names: dict[str, None]) -> str:
    """The label that a published figure stands beside: the tuned weights' if there are any."""
    tuned, original = (label({**entry, "weights": w}) for w in ("tuned", "original"))
    return tuned if tuned in names else original


def _figure(row: Row | None, results: dict[str, Any], findings: Findings, digits: int) -> Cell:
    if row is None:
        return Cell(MISSING, "not among the rows")
    itself = row["method"] == "full" and row["saving"] == 0
    unsaved = row["saving"] is None or itself
    saved = "" if unsaved else f" ({percent(row['saving'])})"
    if row["skipped"] is not None:
        return Cell(MISSING, why_missing(row, "fid", results))
    if row["fid"] is None:
        return Cell(MISSING + saved, why_missing(row, "fid", results))
    error = row["fid_stderr"]
    spread = "" if error is None else f" ± {fixed(error, digits)}"
    return Cell(fixed(row["fid"], digits) + spread + saved, strong=findings.on_front(row))


def _standing(row: Row | None, findings: Findings) -> Cell:
    if row is None:
        return Cell(MISSING, "not among the rows that ran")
    if row["fid"] is None or row["seconds"] is None:
        return Cell(MISSING, "without a FID and a time there is nothing to compare")
    rival = findings.beaten_by(row)
    if rival is None:
        return Cell("on the front", strong=True)
    named = f"{label(rival)}, {rival['steps']} steps"
    place = findings.place(row)
    if place == TIMING:
        return Cell(f"within the timing noise of {named}")
    return Cell(f"behind {named}{', within the noise' if place == NOISE else ''}")


def _fewer(findings: Findings, at: tuple[str, int]) -> Cell:
    """How full depth stands in numbers of steps below a setting's, down to the next setting's."""
    sampler, steps = at
    below = max((s for name, s in findings.settings if name == sampler and s < steps), default=0)
    rows = [
        row
        for row in findings.scored(sampler)
        if label(row) == FULL and below < row["steps"] < steps
    ]
    if not rows:
        return Cell(MISSING, "not among the rows that ran")
    places: dict[str, list[str]] = {place: [] for place in _PLACES}
    for row in rows:
        places[findings.place(row)].append(str(row["steps"]))
    parts = [f"{_PLACES[place]}: {', '.join(found)}" for place, found in places.items() if found]
    return Cell("; ".join(parts), strong=bool(places[FRONT]))
