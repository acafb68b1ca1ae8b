"""The plots of a report: quality against time, time saved by steps, time by depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from accelkit.bench.report.document import percent
from accelkit.bench.report.drawing import (
    COLORS,
    MARKERS,
    MUTED,
    RULE,
    SIZES,
    Panel,
    Plot,
    Point,
    Style,
    readable_axis,
)
from accelkit.bench.report.findings import (
    FULL,
    Findings,
    Row,
    at_full_depth,
    group,
    in_other_steps,
    label,
)

PLOTS = ("pareto", "saving", "depths")
"""The names of all plots that a report may have."""
_LOWEST = -0.5  # lower savings are drawn here, or the plot would show only what costs time
_SPREAD = 0.4  # share of the distance between two numbers of steps that markers spread over


def styles_of(rows: list[Row]) -> dict[str, Style]:
    """Return the style of each method by its label; markers of tuned weights are filled."""
    places: dict[str, int] = {}
    styles = {}
    for row in rows:
        name = label(row)
        method = FULL if at_full_depth(row) else row["method"]
        place = places.setdefault(method, len(places))
        filled = row["weights"] == "tuned" or name == FULL
        size = SIZES[place // len(MARKERS) % len(SIZES)]
        styles[name] = Style(name, group(row), MARKERS[place % len(MARKERS)], filled, size)
    return styles


def pareto(findings: Findings, styles: dict[str, Style]) -> Plot | None:
    """Plot FID against seconds per image, one panel per sampler; bars of time without a FID.

    None if no row has a time.
    """
    panels, shown = [], []
    for sampler in findings.samplers:
        name = sampler.upper()
        if rows := findings.scored(sampler):
            draw = partial(_draw_pareto, findings, styles, rows)
            front = _in_words(
                findings.front(sampler),
                lambda r: f"{findings.seconds(r):.3g} s, FID {r['fid']:.3g}",
            )
            alt = f"FID against seconds per image with {name}. On the Pareto front: {front}."
            panels.append(Panel(name, alt, draw))
            shown += rows
        elif timed := [row for row in findings.of(sampler) if row["seconds"] is not None]:
            draw = partial(_draw_bars, findings, timed)
            times = _in_words(timed, lambda row: f"{findings.seconds(row):.3g} s")
            alt = f"Seconds per image with {name}: {times}."
            panels.append(Panel(name, alt, draw, 24 * len(timed) + 60))
    if not panels:
        return None
    names = dict.fromkeys(label(row) for row in shown)
    caption = (
        "Lower is better, and further left is faster. Vertical bars are one standard error; "
        f"horizontal bars follow from the {findings.interval} of the time saved. The stepped line "
        "is the Pareto front: no other row is both as fast and as good as a row on it. Thin lines "
        "join the rows of one method; the numbers at full depth are its steps."
        if shown
        else "Median time of an image; shorter is faster. There is no FID to compare it with."
    )
    return Plot("pareto", caption, panels, [styles[name] for name in names])


def saving(findings: Findings, styles: dict[str, Style]) -> Plot | None:
    """Plot time saved by the number of steps, None unless a sampler has several settings."""
    panels, shown = [], []
    for sampler in findings.samplers:
        rows = [
            row
            for row in sorted(findings.of(sampler), key=lambda row: row["steps"])
            if (sampler, row["steps"]) in findings.settings
            and row["saving"] is not None
            and not at_full_depth(row)
            and not in_other_steps(row)
        ]
        if len({row["steps"] for row in rows}) > 1:
            draw = partial(_draw_saving, styles, rows)
            savings = _in_words(rows, lambda row: percent(row["saving"]))
            alt = f"Time saved by the number of steps of {sampler.upper()}: {savings}."
            panels.append(Panel(sampler.upper(), alt, draw))
            shown += rows
    if not panels:
        return None
    caption = (
        "Share of full depth's time saved in the same number of steps; higher is faster. "
        f"Bars are {findings.interval}s."
    )
    if any(row["saving"] < _LOWEST for row in shown):
        caption += f" A loss above {-_LOWEST:.0%} is drawn at {-_LOWEST:.0%}, with its figure."
    names = dict.fromkeys(label(row) for row in shown)
    return Plot("saving", caption, panels, [styles[name] for name in names])


def depths(measured: list[dict[str, Any]]) -> Plot:
    """Plot the time of a network call by the number of blocks run, and as MACs predict it."""
    measured = sorted(measured, key=lambda row: row["depth"])
    predicted = _predicted(measured)
    times = "; ".join(
        f"{1e3 * row['seconds']:.3g} ms at depth {row['depth']}"
        + (f" ({predicted[index]:.3g} ms by multiply-adds)" if predicted else "")
        for index, row in enumerate(measured)
    )
    alt = f"Time of a network call of {measured[0]['batch_size']} samples: {times}."
    caption = "Time of one network call by the number of blocks run, with quartiles."
    if predicted:
        caption += (
            " The line is the deepest call's time scaled by multiply-adds: the time above it is "
            "overhead that a schedule does not save."
        )
    return Plot("depths", caption, [Panel("", alt, partial(_draw_depths, measured))], [])


def _draw_pareto(
    findings: Findings, styles: dict[str, Style], rows: list[Row], axes: Any
) -> list[Point]:
    front = findings.front(rows[0]["sampler"])
    place = {id(row): (findings.seconds(row), row["fid"]) for row in rows}
    readable_axis(axes, "x", [x for x, _ in place.values()])
    readable_axis(axes, "y", [y for _, y in place.values()])
    axes.margins(0.14)
    xs, ys = zip(*(place[id(row)] for row in front), strict=True)
    axes.step(xs, ys, where="post", color=RULE, lw=6, solid_capstyle="round", zorder=1)
    for name in dict.fromkeys(label(row) for row in rows):
        style = styles[name]
        curve = sorted((r for r in rows if label(r) == name), key=lambda r: r["steps"])
        if len(curve) > 1:
            path = zip(*(place[id(row)] for row in curve), strict=True)
            axes.plot(*path, color=COLORS[style.kind], lw=1, alpha=0.5, zorder=2)
        for row in curve:
            x, y = place[id(row)]
            if row["fid_stderr"]:
                error = min(row["fid_stderr"], 0.9 * y)  # a logarithmic axis has no 0
                axes.errorbar(x, y, [[error], [row["fid_stderr"]]], color=COLORS[style.kind], lw=1)
            if ends := findings.seconds_interval(row):
                axes.plot(ends, [y, y], color=COLORS[style.kind], lw=1, zorder=2)
            _mark(axes, x, y, style)
    axes.set(xlabel="seconds per image", ylabel="FID")
    ordered = front + [row for row in rows if not findings.on_front(row)]
    named = {label(row): row for row in reversed(ordered)}  # each curve has one label, on the front
    named[FULL] = max(rows, key=lambda row: (label(row) == FULL, row["steps"]))
    labels = [(row, _point_label(row, named[label(row)] is row)) for row in ordered]
    return [(*place[id(row)], text) for row, text in labels]


def _point_label(row: Row, first: bool) -> str:
    if label(row) == FULL:
        return f"{row['steps']} steps" if first else str(row["steps"])
    return label(row) if first else ""


def _draw_bars(findings: Findings, rows: list[Row], axes: Any) -> list[Point]:
    names = [f"{label(row)}, {row['steps']} steps" for row in rows]
    bars = [findings.seconds(row) for row in rows]
    colors = [COLORS[group(row)] for row in rows]
    axes.barh(range(len(rows)), bars, color=colors, height=0.6)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="seconds per image")
    return []


def _draw_saving(styles: dict[str, Style], rows: list[Row], axes: Any) -> list[Point]:
    from matplotlib.ticker import PercentFormatter

    counts = sorted({row["steps"] for row in rows})
    names = list(dict.fromkeys(label(row) for row in rows))
    axes.axhline(0, color=MUTED, lw=0.8)
    clipped = []
    for index, name in enumerate(names):
        style = styles[name]
        curve = [row for row in rows if label(row) == name]
        shift = _SPREAD * ((index + 0.5) / len(names) - 0.5)  # bars must not overlap
        xs = [counts.index(row["steps"]) + shift for row in curve]
        places = [(x, max(row["saving"], _LOWEST)) for x, row in zip(xs, curve, strict=True)]
        axes.plot(*zip(*places, strict=True), color=COLORS[style.kind], lw=1, alpha=0.5, zorder=2)
        for (x, y), row in zip(places, curve, strict=True):
            if row["saving_interval"]:
                ends = [max(end, _LOWEST) for end in row["saving_interval"]]
                axes.plot([x, x], ends, color=COLORS[style.kind], lw=1)
            _mark(axes, x, y, style)
            if row["saving"] < _LOWEST:
                clipped.append((x, y, f"↓ {percent(row['saving'])}"))
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.margins(0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="steps", ylabel="time saved")
    return clipped


def _draw_depths(measured: list[dict[str, Any]], axes: Any) -> list[Point]:
    at = [row["depth"] for row in measured]
    predicted = _predicted(measured)
    times = [1e3 * row["seconds"] for row in measured]
    if predicted:
        axes.plot(at, predicted, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    for row in measured:
        ends = [1e3 * end for end in row["seconds_quartiles"]]
        axes.plot([row["depth"]] * 2, ends, color=COLORS["schedule"], lw=1)
    axes.plot(at, times, "o", color=COLORS["schedule"], ms=6, zorder=3)
    highest = max(1e3 * end for row in measured for end in row["seconds_quartiles"])
    axes.set_ylim(0, 1.05 * max([*predicted, *times, highest]))
    axes.set(xlabel="blocks run", ylabel="milliseconds per call")
    return []


def _predicted(measured: list[dict[str, Any]]) -> list[float]:
    """Return milliseconds proportional to multiply-adds, shallowest first; empty if unknown."""
    full = measured[-1]
    if not full["macs"] or any(row["macs"] is None for row in measured):
        return []
    return [1e3 * full["seconds"] * row["macs"] / full["macs"] for row in measured]


def _mark(axes: Any, x: float, y: float, style: Style) -> None:
    axes.plot(x, y, mew=1.3, zorder=3, **style.look)


def _in_words(rows: list[Row], value: Callable[[Row], str]) -> str:
    return "; ".join(f"{label(row)} in {row['steps']} steps, {value(row)}" for row in rows)
