"""The tables of a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from accelkit.bench.report.document import (
    MINUS,
    MISSING,
    Cell,
    Column,
    Paragraph,
    Table,
    decimals,
    enumerated,
    fixed,
    percent,
)
from accelkit.bench.report.findings import (
    EQUAL_TIME,
    FULL,
    Findings,
    Row,
    in_other_steps,
    label,
    setting,
    verdict,
)

_NAMES = [Column("Method", False), Column("Setting", False)]
_NOT_MEASURED = Cell(MISSING, "not measured")
_SHARES = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class _Measure:
    """A column of a table of all rows: the field it shows, and how."""

    key: str
    heading: str
    show: Callable[[Any, int], str] = fixed
    scale: float = 1.0
    spread: str | None = None
    interval: str | None = None


def _percent(share: float, places: int) -> str:
    return percent(share)


_QUALITY = [
    _Measure("fid", "FID ± SE", spread="fid_stderr"),
    _Measure("sfid", "sFID"),
    _Measure("inception_score", "IS ± SD", spread="inception_score_std"),
    _Measure("kid", "KID ± SD", spread="kid_std"),
    _Measure("precision", "Precision"),
    _Measure("recall", "Recall"),
    _Measure("density", "Density"),
    _Measure("coverage", "Coverage"),
]
_KID_OF_1000 = _Measure("kid", "KID × 1000 ± SD", scale=1e3, spread="kid_std")
_TIMES = [
    _Measure("seconds", "Seconds per batch", interval="seconds_quartiles"),
    _Measure("denoiser_seconds", "in denoising"),
    _Measure("saving", "Time saved", _percent, interval="saving_interval"),
    _Measure("ideal_saving", "MACs saved", _percent),
    _Measure("macs_per_image", "GMACs per image", scale=1e-9),
    _Measure("mean_depth", "Mean depth"),
]
_COSTS = [
    _Measure("first_call_seconds", "First batch, s"),
    _Measure("peak_memory_bytes", "Peak memory, MiB", scale=2**-20),
    _Measure("energy_joules", "Energy, J"),
]


def overview(results: dict[str, Any], findings: Findings) -> Table:
    """Methods by settings, with cells in the form of papers: FID ± standard error (time saved)."""
    columns = [Column("Method", False)]
    columns += [Column(f"{sampler.upper()} {steps}") for sampler, steps in findings.settings]
    at = {
        (label(row), row["sampler"], row["steps"]): row
        for row in reversed(results["rows"])
        if not in_other_steps(row)
    }
    names = dict.fromkeys(
        label(row)
        for row in results["rows"]
        if not in_other_steps(row) and (row["sampler"], row["steps"]) in findings.settings
    )
    places = _fid_places(at.values())
    body = [
        [
            Cell(name),
            *(_figure(at.get((name, *s)), results, findings, places) for s in findings.settings),
        ]
        for name in names
    ]
    note = (
        "FID ± standard error, with the time saved against full depth of the same sampler and "
        "steps in brackets. Bold: on the Pareto front of time and FID."
    )
    return Table("Methods by sampler and steps", columns, body, [note])


def _figure(row: Row | None, results: dict[str, Any], findings: Findings, places: int) -> Cell:
    if row is None:
        return Cell(MISSING, "not among the rows")
    unsaved = row["saving"] is None or (row["method"] == "full" and row["saving"] == 0)
    saved = "" if unsaved else f" ({percent(row['saving'])})"
    if row["fid"] is None:
        return Cell(MISSING + saved, _why_missing(row, "fid", results))
    error = row["fid_stderr"]
    spread = "" if error is None else f" ± {fixed(error, places)}"
    return Cell(fixed(row["fid"], places) + spread + saved, strong=findings.on_front(row))


def against_full_depth(findings: Findings) -> Table | None:
    """Each method next to full depth of the same time and of the same quality.

    None if no sampler has both a method and full depth with times and FIDs.
    """
    rows = []
    for sampler in findings.samplers:
        scored = findings.scored(sampler)
        if any(label(row) == FULL for row in scored):
            rows += [row for row in scored if label(row) != FULL]
    if not rows:
        return None
    found = [(row, findings.same_time(row), findings.same_quality(row)) for row in rows]
    shown = [row for group in found for row in group if row is not None]
    second_places = decimals(findings.seconds(row) for row in shown)
    fid_places = _fid_places(shown)

    def seconds(row: Row) -> str:
        return fixed(findings.seconds(row), second_places)

    body = []
    for row, same_time, same_quality in found:
        cells = [Cell(label(row)), Cell(setting(row))]
        cells += [Cell(seconds(row)), Cell(fixed(row["fid"], fid_places))]
        if same_time is None:
            cells += [Cell(MISSING, "no full depth in fewer steps takes about as long")] * 2
        else:
            fid = fixed(same_time["fid"], fid_places)
            cells.append(Cell(f"{fid} ({same_time['steps']} steps)"))
            cells.append(Cell(verdict(row, same_time)))
        if same_quality is None:
            cells.append(Cell(MISSING, "every full depth has a higher FID"))
        else:
            cells.append(Cell(f"{seconds(same_quality)} ({same_quality['steps']} steps)"))
        body.append(cells)
    columns = [*_NAMES, Column("s per image"), Column("FID"), Column("Full depth, equal time: FID")]
    columns += [Column("The method's FID is", False), Column("Full depth, equal FID: s per image")]
    notes = [
        f"Equal time: full depth in fewer steps, within {EQUAL_TIME:.0%}; of several the nearest "
        "that is no faster than the method. Equal FID: the fastest full depth, in any number of "
        "steps, whose FID is not distinguishably higher.",
        "A row's time is full depth's median at its setting minus the share saved, which comes "
        "from paired rounds; without a saving it is the row's own median.",
    ]
    return Table("Methods against full depth at equal time and at equal FID", columns, body, notes)


def published(results: dict[str, Any], findings: Findings) -> Table | None:
    """Published figures next to the measured ones; None if there are none."""
    entries = results["published"]
    if not entries:
        return None
    rows = {
        (row["method"], row["sampler"], row["steps"]): row
        for row in sorted(results["rows"], key=lambda row: row["weights"])  # tuned ones replace
    }
    places = _fid_places(rows.values())
    body = []
    for entry in entries:
        text = MISSING if entry["fid"] is None else f"{entry['fid']:.9g}"
        if entry["fid_std"] is not None:
            text += f" ± {entry['fid_std']:.9g}"
        if entry["saving"] is not None:
            text += f" ({100 * entry['saving']:.9g}%)"
        reason = None if entry["fid"] is not None else "no FID was published"
        row = rows.get((entry["method"], entry["sampler"], entry["steps"]))
        body.append(
            [
                Cell(label(row or {**entry, "weights": "original"})),
                Cell(setting(entry)),
                Cell(text.replace("-", MINUS), reason),
                _figure(row, results, findings, places),
                Cell(f"{entry['source']}: {entry['setting']}"),
            ]
        )
    columns = [*_NAMES, Column("Published"), Column("Measured"), Column("Source", False, True)]
    note = (
        "A FID falls with the number of images and depends on feature extractor and reference: "
        "compare published and measured figures only where these are the same."
    )
    return Table("Published figures", columns, body, [note])


def quality(results: dict[str, Any]) -> Table | Paragraph:
    """All quality figures of all rows."""
    known = [abs(row["kid"]) for row in results["rows"] if row["kid"] is not None]
    small = bool(known) and max(known) < 1  # features like Inception's; raw pixels give more
    measures = [_KID_OF_1000 if m.key == "kid" and small else m for m in _QUALITY]
    return _all_rows("Quality figures", measures, results)


def times(results: dict[str, Any]) -> Table | Paragraph:
    """Time and multiply-adds of all rows."""
    table = _all_rows("Time and multiply-adds", _TIMES, results)
    if isinstance(table, Table) and any(row["saving"] is not None for row in results["rows"]):
        table.notes.append(
            "Seconds are each row's own median and quartiles. The time saved comes from paired "
            "rounds, and rows are compared by it."
        )
    return table


def costs(results: dict[str, Any]) -> Table | Paragraph:
    """First batch, memory and energy of all rows."""
    table = _all_rows("First batch, memory and energy", _COSTS, results)
    known = any(row["peak_memory_bytes"] is not None for row in results["rows"])
    if isinstance(table, Table) and known and results["protocol"]["machine"]["gpu"] is None:
        table.notes.append(
            "Without a GPU, peak memory is the resident memory of the whole process, not what a "
            "method needs."
        )
    return table


def throughput(measured: list[dict[str, Any]]) -> Table:
    """Images per second by batch size."""
    sizes = sorted({row["batch_size"] for row in measured})
    places = min(decimals(row["images_per_second"] for row in measured), 2)
    rates: dict[tuple[str, str], dict[int, float]] = {}
    for row in measured:
        of_row = rates.setdefault((label(row), setting(row)), {})
        of_row[row["batch_size"]] = row["images_per_second"]
    body = [
        [
            *map(Cell, names),
            *(Cell(fixed(rate[s], places)) if s in rate else _NOT_MEASURED for s in sizes),
        ]
        for names, rate in rates.items()
    ]
    columns = [*_NAMES, *(Column(f"batch {size}") for size in sizes)]
    return Table("Images per second by batch size", columns, body)


def _all_rows(
    caption: str, measures: Sequence[_Measure], results: dict[str, Any]
) -> Table | Paragraph:
    """Return the measures of all rows. Those that no row has are named below, with the reason."""
    rows, shown = results["rows"], []
    absent: dict[str, list[str]] = {}
    for measure in measures:
        if any(row[measure.key] is not None for row in rows):
            shown.append(measure)
        else:
            ran = [row for row in rows if row["skipped"] is None] or rows
            why = "; ".join(dict.fromkeys(_why_missing(row, measure.key, results) for row in ran))
            absent.setdefault(why, []).append(re.split(" [±×]|,", measure.heading)[0])
    notes = [f"Not shown: {enumerated(names)} ({why})." for why, names in absent.items()]
    if not shown:
        return Paragraph(" ".join(notes))
    places = [_places(measure, rows) for measure in shown]
    body = []
    for row in rows:
        cells = [Cell(label(row)), Cell(setting(row))]
        for measure, digits in zip(shown, places, strict=True):
            if row[measure.key] is None:
                cells.append(Cell(MISSING, _why_missing(row, measure.key, results)))
            else:
                cells.append(Cell(_value(measure, row, digits)))
        body.append(cells)
    return Table(caption, [*_NAMES, *(Column(m.heading) for m in shown)], body, notes)


def _places(measure: _Measure, rows: list[Row]) -> int:
    """Return the number of decimals of a column."""
    if measure.key in _SHARES:
        return 3
    values = [measure.scale * row[measure.key] for row in rows if row[measure.key] is not None]
    return 0 if all(isinstance(value, int) for value in values) else min(decimals(values), 4)


def _fid_places(rows: Iterable[Row]) -> int:
    return min(decimals(row["fid"] for row in rows), 3)


def _value(measure: _Measure, row: Row, places: int) -> str:
    text = measure.show(measure.scale * row[measure.key], places)
    spread = row[measure.spread] if measure.spread else None
    interval = row[measure.interval] if measure.interval else None
    if spread is not None:
        text += f" ± {measure.show(measure.scale * spread, places)}"
    if interval is not None:
        low, high = (measure.show(measure.scale * end, places) for end in interval)
        text += f" ({low} to {high})"
    return text


def _why_missing(row: Row, key: str, results: dict[str, Any]) -> str:
    """Return why a row has no value in a field."""
    if row["skipped"] is not None:
        return f"skipped: {row['skipped']}"
    if key in row["missing"]:
        return row["missing"][key]
    if key in {measure.key for measure in _QUALITY}:
        for part, what in (("extractor", "feature extractor"), ("reference", "reference")):
            if results["protocol"][part] is None:
                return f"there was no {what} for quality figures"
    return "not measured"
