"""Published figures in a report: as they were printed, and with what they are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelkit.bench.report.document import MISSING, Cell, Column, Table
from accelkit.bench.report.findings import Findings, label, setting
from accelkit.bench.report.formats import fixed

Entry = dict[str, Any]

_CAUTION = (
    "A FID falls with the number of images and depends on extractor and reference: compare "
    "published with measured ones only where these are the same."
)


def as_printed(published: list[Entry]) -> Callable[[Entry], str]:
    """Return what shows an entry: with as many decimals as any figure of its source has.

    A table prints all its figures alike, and numbers do not tell 9.10 from 9.1.
    """
    places: dict[tuple[str, str], int] = {}
    for entry in published:
        for key in ("fid", "fid_std", "saving"):
            at = entry["source"], key
            places[at] = max(places.get(at, 0), _decimals(_value(entry, key)))

    def show(entry: Entry) -> str:
        def of(key: str) -> str | None:
            value = _value(entry, key)
            return None if value is None else fixed(value, places[entry["source"], key])

        fid, spread, saved = of("fid") or MISSING, of("fid_std"), of("saving")
        spread = "" if spread is None else f" ± {spread}"
        return fid + spread + ("" if saved is None else f" ({saved}%)")

    return show


def several(entries: list[Entry]) -> dict[str, str]:
    """Return the trainings that a method has figures of at one setting, and what sets them apart.

    It is empty if there is one figure of each sampler and number of steps.
    """
    known = [(setting(entry), entry["setting"]) for entry in entries]
    trainings = list(dict.fromkeys(training for _, training in known))
    if len({at for at, _ in known}) == len(set(known)):
        return {}
    parts = [training.split(", ") for training in trainings]
    shared = 0
    while len({tuple(part[: shared + 1]) for part in parts}) == 1:
        shared += 1
    return {
        training: ", ".join(part[shared:]) for training, part in zip(trainings, parts, strict=True)
    }


def elsewhere(results: dict[str, Any], findings: Findings) -> Table | None:
    """The figures published for samplers and steps that were not run; None without any."""
    entries = [
        entry
        for entry in results["published"]
        if (entry["sampler"], entry["steps"]) not in findings.settings
    ]
    if not entries:
        return None
    show = as_printed(results["published"])
    body = [
        [
            Cell(label({**entry, "weights": "original"})),
            Cell(setting(entry)),
            Cell(show(entry)),
            Cell(entry["setting"]),
        ]
        for entry in entries
    ]
    columns = [Column("Method", False), Column("Setting", False), Column("Published")]
    columns.append(Column("Of", False, prose=True))
    return Table("Published for settings that were not run", columns, body, notes(entries))


def notes(entries: list[Entry]) -> list[str]:
    """Return where figures are from, and how far they can be compared."""
    texts = dict.fromkeys(f"{p['source']} ({p['setting']})" for p in entries)
    return [f"Published: {text}." for text in texts] + [_CAUTION] * bool(texts)


def _value(entry: Entry, key: str) -> float | None:
    value = entry[key]
    return round(100 * value, 9) if key == "saving" and value is not None else value


def _decimals(value: float | None) -> int:
    return len(f"{value:.9f}".rstrip("0").split(".")[1]) if value is not None else 0
