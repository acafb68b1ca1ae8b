"""The report's plots: quality against time, saving against steps, time against depth."""

from __future__ import annotations

from functools import partial
from typing import Any

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
from accelkit.bench.report.formats import percent
from accelkit.bench.report.listings import counted

PLOTS = ("pareto", "saving", "depths")
"""The names of all that there may be."""
_LOWEST = -0.5  # of the time saved: below it a plot would be of what costs time alone
_ASIDE = 0.4  # of the way from one number of steps to the next


def styles_of(rows: list[Row]) -> dict[str, Style]:
    """Return how each method is drawn, by its label; on tuned weights its marker is filled."""
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
    """FID against seconds per image, a panel per sampler; where there is no FID, bars of time.

    None if no row has a time.
    """
    panels, shown = [], []
    for sampler in findings.samplers:
        if rows := findings.scored(sampler):
            draw = partial(_draw_pareto, findings, styles, rows)
            panels.append(Panel(sampler.upper(), _pareto_alt(findings, sampler, rows), draw))
            shown += rows
        elif timed := [row for row in findings.of(sampler) if row["seconds"] is not None]:
            draw = partial(_draw_bars, findings, timed)
            alt = _bars_alt(findings, sampler, timed)
            panels.append(Panel(sampler.upper(), alt, draw, 24 * len(timed) + 60))
    if not panels:
        return None
    names = dict.fromkeys(label(row) for row in shown)
    caption = (
        "Lower is better and further left is faster. Vertical bars are one standard error, "
        f"horizontal ones what the {findings.interval} of the time saved leaves open. The stepped "
        "line is the Pareto front: no row is both faster and of lower FID than one that lies on "
        "it. Thin lines join one method over its numbers of steps, which are written beside full "
        "depth."
        if shown
        else "Median time of an image; shorter is faster. There is no FID to draw it against."
    )
    return Plot("pareto", caption, panels, [styles[name] for name in names])


def saving(findings: Findings, styles: dict[str, Style]) -> Plot | None:
    """Saving against the number of steps, None unless some sampler has several settings."""
    panels, shown = [], []
    for sampler in findings.samplers:
        counts = sorted(steps for name, steps in findings.settings if name == sampler)
        rows = [
            row
            for steps in counts
            for row in findings.at(sampler, steps)
            if row["saving"] is not None and not at_full_depth(row) and not in_other_steps(row)
        ]
        if len({row["steps"] for row in rows}) > 1:
            draw = partial(_draw_saving, styles, rows)
            panels.append(Panel(sampler.upper(), _saving_alt(sampler, rows), draw))
            shown += rows
    if not panels:
        return None
    caption = (
        "Share of full depth's time saved at the same number of steps; higher is faster. "
        f"Bars are {findings.interval}s."
    )
    if any(row["saving"] < _LOWEST for row in shown):
        caption += f" What costs more than {-_LOWEST:.0%} is drawn there, with its figure."
    names = dict.fromkeys(label(row) for row in shown)
    return Plot("saving", caption, panels, [styles[name] for name in names])


def depths(measured: list[dict[str, Any]]) -> Plot:
    """Time of a network call by the number of blocks run, beside what its multiply-adds predict."""
    measured = sorted(measured, key=lambda row: row["depth"])
    low, high = measured[0], measured[-1]
    alt = (
        f"Time of a network call of {high['batch_size']} samples by blocks run: "
        f"{1e3 * low['seconds']:.3g} ms at depth {low['depth']}, "
        f"{1e3 * high['seconds']:.3g} ms at depth {high['depth']}"
    )
    caption = "Time of one network call by the number of blocks run, with quartiles."
    if counted(measured):
        predicted = 1e3 * _predicted(low, high)
        alt += f"; by multiply-adds {predicted:.3g} ms at depth {low['depth']}"
        caption += (
            " The line is the deepest call's time scaled by multiply-adds: what lies above it "
            "costs time that a schedule does not save."
        )
    return Plot("depths", caption, [Panel("", f"{alt}.", partial(_draw_depths, measured))], [])


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
            axes.plot(*path, color=style.color, lw=1, alpha=0.5, zorder=2)
        for row in curve:
            x, y = place[id(row)]
            if row["fid_stderr"]:
                error = min(row["fid_stderr"], 0.9 * y)  # a logarithm ends above 0
                axes.errorbar(x, y, [[error], [row["fid_stderr"]]], color=style.color, lw=1)
            if ends := findings.seconds_interval(row):
                axes.plot(ends, [y, y], color=style.color, lw=1, zorder=2)
            _mark(axes, x, y, style)
    axes.set(xlabel="seconds per image", ylabel="FID")
    ordered = front + [row for row in rows if not findings.on_front(row)]
    named = {label(row): row for row in reversed(ordered)}  # a curve is named once, on the front
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
        aside = _ASIDE * ((index + 0.5) / len(names) - 0.5)  # so that bars do not hide each other
        xs = [counts.index(row["steps"]) + aside for row in curve]
        places = [(x, max(row["saving"], _LOWEST)) for x, row in zip(xs, curve, strict=True)]
        axes.plot(*zip(*places, strict=True), color=style.color, lw=1, alpha=0.5, zorder=2)
        for (x, y), row in zip(places, curve, strict=True):
            if row["saving_interval"]:
                ends = [max(end, _LOWEST) for end in row["saving_interval"]]
                axes.plot([x, x], ends, color=style.color, lw=1)
            _mark(axes, x, y, style)
            if row["saving"] < _LOWEST:
                clipped.append((x, y, f"↓ {percent(row['saving'])}"))
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.margins(0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="steps", ylabel="time saved")
    return clipped


def _draw_depths(measured: list[dict[str, Any]], axes: Any) -> list[Point]:
    high = measured[-1]
    at = [row["depth"] for row in measured]
    predicted = [1e3 * _predicted(row, high) for row in measured if counted(measured)]
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


def _predicted(row: dict[str, Any], full: dict[str, Any]) -> float:
    """Seconds of a call if time followed multiply-adds."""
    return full["seconds"] * row["macs"] / full["macs"] if full["macs"] else full["seconds"]


def _mark(axes: Any, x: float, y: float, style: Style) -> None:
    axes.plot(
        x, y, style.marker, color=style.color, mfc=style.face, ms=style.size, mew=1.3, zorder=3
    )


def _pareto_alt(findings: Findings, sampler: str, rows: list[Row]) -> str:
    on = "; ".join(
        f"{label(row)} in {row['steps']} steps, {findings.seconds(row):.3g} s, FID {row['fid']:.3g}"
        for row in findings.front(sampler)
    )
    shown = f"{len(rows)} rows of {sampler.upper()}"
    return f"FID against seconds per image for {shown}. On the Pareto front: {on}."


def _bars_alt(findings: Findings, sampler: str, rows: list[Row]) -> str:
    times = "; ".join(
        f"{label(row)} in {row['steps']} steps, {findings.seconds(row):.3g} s" for row in rows
    )
    return f"Seconds per image with {sampler.upper()}: {times}."


def _saving_alt(sampler: str, rows: list[Row]) -> str:
    savings = "; ".join(
        f"{label(row)} in {row['steps']} steps, {percent(row['saving'])}" for row in rows
    )
    return f"Time saved by the number of steps of {sampler.upper()}: {savings}."
