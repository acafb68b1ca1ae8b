"""The report's tables of all there is: every row's figures, calls by depth, throughput."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelkit.bench.report.document import MISSING, Cell, Column, Paragraph, Table
from accelkit.bench.report.findings import Row, label, setting
from accelkit.bench.report.formats import decimals, fixed, listed, percent

_NAMES = [Column("Method", False), Column("Setting", False)]
_NONE = Cell(MISSING, "not measured")


@dataclass(frozen=True)
class _Measure:
    """A column of a table of all rows: how a row's value is found and shown."""

    key: str
    heading: str
    show: Callable[[Any, int], str] = fixed
    scale: float = 1.0
    spread: str | None = None
    interval: str | None = None


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
    _Measure("saving", "Time saved", lambda x, _: percent(x), interval="saving_interval"),
    _Measure("ideal_saving", "MACs saved", lambda x, _: percent(x)),
    _Measure("macs_per_image", "GMACs per image", scale=1e-9),
    _Measure("mean_depth", "Mean depth"),
]
_COSTS = [
    _Measure("first_call_seconds", "First batch, s"),
    _Measure("peak_memory_bytes", "Peak memory, MiB", scale=2**-20),
    _Measure("energy_joules", "Energy, J"),
]
_SHARES = ("precision", "recall", "density", "coverage")


def quality(results: dict[str, Any]) -> Table | Paragraph:
    """All quality figures of all rows."""
    known = [abs(row["kid"]) for row in results["rows"] if row["kid"] is not None]
    small = bool(known) and max(known) < 1  # as of Inception's features, and not of raw ones
    measures = [_KID_OF_1000 if m.key == "kid" and small else m for m in _QUALITY]
    return _all_rows("Quality figures", measures, results)


def times(results: dict[str, Any]) -> Table | Paragraph:
    """Time and work of all rows."""
    made = _all_rows("Time and multiply-adds", _TIMES, results)
    if isinstance(made, Table) and any(row["saving"] is not None for row in results["rows"]):
        made.notes.append(
            "Seconds are each row's own median; the time saved is of paired rounds, and is what "
            "rows are compared by."
        )
    return made


def costs(results: dict[str, Any]) -> Table | Paragraph:
    """What all rows cost beside the time of a batch."""
    made = _all_rows("First batch, memory and energy", _COSTS, results)
    known = any(row["peak_memory_bytes"] is not None for row in results["rows"])
    if isinstance(made, Table) and known and results["protocol"]["machine"]["gpu"] is None:
        made.notes.append(
            "Peak memory without a GPU is the process's resident memory: all that it holds, and "
            "not what a method needs."
        )
    return made


def depths(measured: list[dict[str, Any]]) -> Table:
    """One network call by depth, measured and by multiply-adds."""
    measured = sorted(measured, key=lambda row: -row["depth"])
    deepest = measured[0]
    digits = decimals(1e3 * row["seconds"] for row in measured)
    body = [
        [
            Cell(str(row["depth"])),
            Cell(fixed(1e3 * row["seconds"], digits)),
            Cell("–".join(fixed(1e3 * end, digits) for end in row["seconds_quartiles"])),
            Cell(percent(row["seconds"] / deepest["seconds"])) if deepest["seconds"] else _NONE,
        ]
        for row in measured
    ]
    headings = ["Blocks run", "ms per call", "quartiles", "of full time"]
    if counted(measured):
        headings += ["GMACs", "of full MACs"]
        macs = decimals(1e-9 * row["macs"] for row in measured)
        for cells, row in zip(body, measured, strict=True):
            cells.append(Cell(fixed(1e-9 * row["macs"], macs)))
            full = deepest["macs"]
            cells.append(Cell(percent(row["macs"] / full)) if full else _NONE)
    caption = f"One network call of {deepest['batch_size']} samples by depth"
    return Table(caption, [Column(heading) for heading in headings], body)


def counted(measured: list[dict[str, Any]]) -> bool:
    """Return whether the multiply-adds of calls by depth are known."""
    return all(row["macs"] is not None for row in measured)


def throughput(measured: list[dict[str, Any]]) -> Table:
    """Images per second by batch size."""
    sizes = sorted({row["batch_size"] for row in measured})
    digits = min(decimals(row["images_per_second"] for row in measured), 2)
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in measured:
        found.setdefault((label(row), setting(row)), {})[row["batch_size"]] = row[
            "images_per_second"
        ]
    body = []
    for names, by_size in found.items():
        cells = [Cell(name) for name in names]
        for size in sizes:
            known = size in by_size
            cells.append(Cell(fixed(by_size[size], digits)) if known else _NONE)
        body.append(cells)
    columns = [*_NAMES, *(Column(f"batch {size}") for size in sizes)]
    return Table("Images per second by batch size", columns, body)


def _all_rows(
    caption: str, measures: Sequence[_Measure], results: dict[str, Any]
) -> Table | Paragraph:
    """A row per row; what no row has is left out, and named below with the reason."""
    rows, shown = results["rows"], []
    absent: dict[str, list[str]] = {}
    for measure in measures:
        if any(row[measure.key] is not None for row in rows):
            shown.append(measure)
        else:
            ran = [row for row in rows if row["skipped"] is None] or rows
            why = "; ".join(dict.fromkeys(why_missing(row, measure.key, results) for row in ran))
            absent.setdefault(why, []).append(re.split(" [±×]|,", measure.heading)[0])
    notes = [f"Not shown: {listed(names)} ({why})." for why, names in absent.items()]
    if not shown:
        return Paragraph(" ".join(notes))
    places = [_places(measure, rows) for measure in shown]
    body = []
    for row in rows:
        cells = [Cell(label(row)), Cell(setting(row))]
        for measure, digits in zip(shown, places, strict=True):
            if row[measure.key] is None:
                cells.append(Cell(MISSING, why_missing(row, measure.key, results)))
            else:
                cells.append(Cell(_value(measure, row, digits)))
        body.append(cells)
    return Table(caption, [*_NAMES, *(Column(m.heading) for m in shown)], body, notes)


def _places(measure: _Measure, rows: list[Row]) -> int:
    """Decimals of a column."""
    if measure.key in _SHARES:
        return 3
    values = [measure.scale * row[measure.key] for row in rows if row[measure.key] is not None]
    return 0 if all(isinstance(value, int) for value in values) else min(decimals(values), 4)


def _value(measure: _Measure, row: Row, digits: int) -> str:
    text = measure.show(measure.scale * row[measure.key], digits)
    spread = row[measure.spread] if measure.spread else None
    interval = row[measure.interval] if measure.interval else None
    if spread is not None:
        text += f" ± {measure.show(measure.scale * spread, digits)}"
    if interval is not None:
        low, high = (measure.show(measure.scale * end, digits) for end in interval)
        text += f" ({low} to {high})"
    return text


def why_missing(row: Row, key: str, results: dict[str, Any]) -> str:
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
