"""What the commands print: tables, bars and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from accelkit.schedule import Schedule

out = Console(markup=False, emoji=False)
"""Standard output, which shows brackets and colons of a name unchanged."""


def overview(chosen: list[Schedule], levels: list[float] | None, where: str) -> Table:
    """Return a table with a row per schedule, whose bars show the depth by noise level."""
    bars, width = " ▁▂▃▄▅▆▇█", 20
    table = Table(title=f"blocks run of {chosen[0].layers} ({where})", title_justify="left")
    table.add_column("schedule")
    table.add_column("data → noise", no_wrap=True, min_width=width)
    for heading in ("depths", "mean depth", saved(chosen[0])):
        table.add_column(heading, justify="left" if heading == "depths" else "right")
    for s in chosen:
        depths = [s.depth_at((i + 0.5) / width) for i in range(width)]
        table.add_row(
            s.name,
            "".join(bars[max(d > 0, round(8 * d / s.layers))] for d in depths),
            " ".join(map(str, s.computes)),
            f"{s.mean_depth(levels):.2f}",
            f"{s.ideal_saving(levels):.2%}",
        )
    return table


def intervals(schedule: Schedule) -> Table:
    """Return a table with a row per interval, whose bar is as long as the depth."""
    table = Table(title=schedule.name or None, title_justify="left")
    table.add_column("noise level")
    table.add_column("blocks", justify="right")
    table.add_column("", no_wrap=True)
    bounds = zip((0.0, *schedule.edges), schedule.edges, schedule.computes, strict=False)
    for low, high, compute in bounds:
        bar = "█" * max(compute.depth > 0, round(28 * compute.depth / schedule.layers))
        table.add_row(f"{low:g} – {high:g}", str(compute), bar)
    return table


def saved(schedule: Schedule) -> str:
    """Return the heading for the share of blocks saved, of the cost if all blocks are counted."""
    return "counted blocks saved" if schedule.family else "ideal saving"


def worded(value: Any) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show_settings(settings: Mapping[str, Any], as_json: bool) -> None:
    """Print settings by name, as a table or as JSON."""
    if as_json:
        typer.echo(json.dumps(settings, indent=2, default=str))
        return
    table = Table("setting", "value", title="settings", title_justify="left")
    for key, value in settings.items():
        table.add_row(key, str(value))
    out.print(table)


def print_results(results: dict[str, Any], output: Path, as_json: bool) -> None:
    """Print a comparison's rows as a table with a summary, or the rows as JSON."""
    from accelkit.bench.report.findings import Findings
    from accelkit.bench.report.text import summary

    rows = results["rows"]
    if as_json:
        typer.echo(json.dumps({"output": str(output), "rows": rows}, indent=2))
        return
    table = Table(title=f"results in {output}", title_justify="left")
    words = ("method", "weights", "sampler")
    for heading in (*words, "FID", "seconds per batch", "time saved", "ideal saving"):
        table.add_column(
            heading,
            justify="left" if heading in words else "right",
            overflow="fold",  # or rich cuts the names of methods
        )
    for row in rows:
        table.add_row(
            row["method"],
            row["weights"],
            f"{row['sampler']}:{row['steps']}",
            *(_measured(row) if row["skipped"] is None else ("skipped", "–", "–", "–")),
        )
    out.print(table)
    for about, text in summary(results, Findings(results)):
        out.print(f"{about}: {text}", highlight=False, markup=False, soft_wrap=True)


def _measured(row: dict[str, Any]) -> tuple[str, ...]:
    fid = "–" if row["fid"] is None else f"{row['fid']:.3f}"
    if row["fid_stderr"] is not None:
        fid += f" ± {row['fid_stderr']:.2f}"
    share = "–" if row["ideal_saving"] is None else f"{row['ideal_saving']:.1%}"
    return fid, f"{row['seconds']:.2f}", f"{row['saving']:.1%}", share
