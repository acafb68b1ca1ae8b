"""The report's tables that compare: as papers do, by who wins where, at equal time."""

from __future__ import annotations

from math import prod
from typing import Any

from accelkit.bench.document import MISSING, Cell, Column, Table
from accelkit.bench.findings import FULL, LOWER, Findings, Row, grouped, label, setting, verdict
from accelkit.bench.formats import decimals, fixed, percent
from accelkit.bench.listings import why_missing


def papers(results: dict[str, Any], findings: Findings) -> Table:
    """Methods by samplers, a cell as papers give it: FID ± standard error (time saved)."""
    published = {at: [p for p in results["published"] if _at(p) == at] for at in findings.settings}
    columns = [Column("Method", False)]
    for at in findings.settings:
        columns.append(Column(_heading(at)))
        if published[at]:
            columns.append(Column(f"{_heading(at)}, published"))
    rows = [row for row in results["rows"] if _at(row) in findings.settings]
    quoted = [entry for entries in published.values() for entry in entries]
    names = dict.fromkeys(label(row) for row in rows)
    names |= dict.fromkeys(_beside(entry, names) for entry in quoted)
    digits = decimals(row["fid"] for row in rows)
    body = []
    for name in names:
        cells = [Cell(name)]
        for at in findings.settings:
            row = next((r for r in rows if label(r) == name and _at(r) == at), None)
            cells.append(_figure(row, results, findings, min(digits, 3)))
            if published[at]:
                cells.append(_quoted([p for p in published[at] if _beside(p, names) == name]))
        body.append(cells)
    notes = [
        "FID ± standard error, and in brackets the time saved against full depth of the same "
        "sampler and steps. Bold: on the Pareto front of seconds and FID.",
    ]
    for text in dict.fromkeys(f"{p['source']} ({p['setting']})" for p in quoted):
        notes.append(f"Published: {text}.")
    if quoted:
        notes.append(
            "A FID falls with the number of images and depends on extractor and reference: compare "
            "a column with another only where these are the same."
        )
    return Table("Methods by samplers", columns, body, notes)


def where_each_wins(findings: Findings) -> Table | None:
    """Methods by samplers, a cell says whether something else is both faster and better.

    None where nothing has both a time and a FID.
    """
    if not any(findings.scored(sampler) for sampler in findings.samplers):
        return None
    body = []
    for name in dict.fromkeys(label(row) for row in findings.rows):
        cells = [Cell(name)]
        for at in findings.settings:
            row = next((r for r in findings.at(*at) if label(r) == name), None)
            cells.append(_standing(row, findings))
        body.append(cells)
    fewer = [_fewer(findings, at) for at in findings.settings]
    if any(cell.text != MISSING for cell in fewer):
        body.append([Cell("full depth in fewer steps"), *fewer])
    columns = [Column("Method", False)]
    columns += [Column(_heading(at), False, prose=True) for at in findings.settings]
    notes = [
        "Behind: the row named takes no longer and has the lower FID. Rows of a sampler are held "
        "against each other over all numbers of steps."
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
    notes = []
    if alone:
        notes.append(f"No full depth in fewer steps takes within 15% of: {grouped(alone)}.")
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
    unsaved = row["saving"] is None or (label(row) == FULL and row["saving"] == 0)
    saved = "" if unsaved else f" ({percent(row['saving'])})"
    if row["skipped"] is not None:
        return Cell(MISSING, why_missing(row, "fid", results))
    if row["fid"] is None:
        return Cell(MISSING + saved, why_missing(row, "fid", results))
    error = row["fid_stderr"]
    spread = "" if error is None else f" ± {fixed(error, digits)}"
    return Cell(fixed(row["fid"], digits) + spread + saved, strong=findings.on_front(row))


def _quoted(entries: list[dict[str, Any]]) -> Cell:
    """Published figures, as many digits as they were published with."""
    texts = []
    for entry in entries:
        fid = MISSING if entry["fid"] is None else f"{entry['fid']:g}"
        spread = "" if entry["fid_std"] is None else f" ± {entry['fid_std']:g}"
        saved = "" if entry["saving"] is None else f" ({100 * entry['saving']:.4g}%)"
        texts.append(fid + spread + saved)
    return Cell("; ".join(texts)) if texts else Cell(MISSING, "not published")


def _standing(row: Row | None, findings: Findings) -> Cell:
    if row is None:
        return Cell(MISSING, "not among the rows that ran")
    if row["fid"] is None or row["seconds"] is None:
        return Cell(MISSING, "without a FID and a time there is nothing to compare")
    rival = findings.beaten_by(row)
    if rival is None:
        return Cell("on the front", strong=True)
    doubt = "" if verdict(rival, row) == LOWER else ", within the noise"
    return Cell(f"behind {label(rival)}, {rival['steps']} steps{doubt}")


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
    on = [str(row["steps"]) for row in rows if findings.on_front(row)]
    behind = [str(row["steps"]) for row in rows if not findings.on_front(row)]
    parts = [f"on the front: {', '.join(on)}"] * bool(on)
    parts += [f"behind: {', '.join(behind)}"] * bool(behind)
    return Cell("; ".join(parts), strong=bool(on))
