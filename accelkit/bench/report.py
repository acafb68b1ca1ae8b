"""What a comparison leaves behind: the report as a web page and as Markdown, and its plots."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from accelkit.bench.document import Document
from accelkit.bench.html import html
from accelkit.bench.markdown import markdown
from accelkit.bench.plots import FOLDER, Plot, png, svg
from accelkit.bench.results import RESULTS, machine
from accelkit.bench.sections import document
from accelkit.files import explain_full_disk, write_json

HTML, MARKDOWN = "report.html", "report.md"
SCHEMA = 1
PLOT = "results.png"


def write_report(directory: Path, results: dict[str, Any]) -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``plots/*.png`` and ``.svg``; return their paths.

    Args:
        directory: where ``results.json`` lies, or would, and the pictures of samples do: the page
            has them in it. Those that are not there are named in the report.
        results: as :func:`accelkit.bench.results.read_results` returns them.

    Raises:
        AccelkitError: a picture of samples cannot be read, or there is no room to write.
    """
    made = document(directory, results)
    files = {directory / HTML: html(made).encode(), directory / MARKDOWN: markdown(made).encode()}
    for plot in _plots(made):
        files[directory / FOLDER / f"{plot.name}.png"] = png(plot)
        files[directory / FOLDER / f"{plot.name}.svg"] = svg(plot)
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    for path, content in files.items():
        _write(path, content)
    return list(files)


def _plots(made: Document) -> list[Plot]:
    blocks = [block for section in made.sections for block in section.blocks]
    return [block for block in blocks if isinstance(block, Plot)]


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".partial")
    with explain_full_disk(path):
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_results(directory: Path, protocol: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write ``results.json``: schema, protocol with command and machine, rows. Return its path."""
    command = " ".join(["accelkit", *sys.argv[1:]])
    full = {"command": command, **protocol, "machine": machine()}
    path = directory / RESULTS
    write_json(path, {"schema": SCHEMA, "protocol": full, "rows": rows})
    return path


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw quality against time as a PNG; bars of the time alone if there is no quality figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    names = [row["schedule"] + (" tuned" if row["tuned"] else "") for row in rows]
    seconds = [row["seconds"] for row in rows]
    if all(row["fid"] is not None for row in rows):
        for row, name in zip(rows, names, strict=True):
            marker, color = ("o", "C0") if row["tuned"] else ("x", "C3")
            if row["ideal_saving"] == 0:
                marker, color = "s", "0.3"
            axes.scatter(row["seconds"], row["fid"], s=48, color=color, marker=marker)
            axes.annotate(name, (row["seconds"], row["fid"]), (6, 4), textcoords="offset points")
        axes.set(xlabel="seconds per batch", ylabel="Fréchet distance", yscale="log")
        axes.margins(0.15)
    else:
        axes.barh(names[::-1], seconds[::-1])
        axes.set(xlabel="seconds per batch")
    axes.grid(alpha=0.3)
    part = path.with_name(path.name + ".partial")
    figure.savefig(part, format="png")
    part.replace(path)
