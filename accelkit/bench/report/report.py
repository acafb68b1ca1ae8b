"""What a comparison leaves behind: the report as a web page and as Markdown, and its plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelkit.bench.report.document import Document
from accelkit.bench.report.drawing import FOLDER, Plot, png, svg
from accelkit.bench.report.figures import PLOTS
from accelkit.bench.report.html import html
from accelkit.bench.report.markdown import markdown
from accelkit.bench.report.sections import document
from accelkit.files.writing import AGAIN, write_bytes

HTML, MARKDOWN = "report.html", "report.md"


def write_report(directory: Path, results: dict[str, Any]) -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``plots/*.png`` and ``.svg``; return their paths.

    Args:
        directory: where ``results.json`` lies, or would, and the pictures of samples do: the page
            has them in it. Those that are not there are named in the report.
        results: as :func:`accelkit.bench.results.read_results` returns them.

    Raises:
        AccelkitError: a picture of samples cannot be read, or there is no room to write.
    """
    made = document(directory, _encodable(results))
    files = {directory / HTML: html(made).encode(), directory / MARKDOWN: markdown(made).encode()}
    for plot in _plots(made):
        files[directory / FOLDER / f"{plot.name}.png"] = png(plot)
        files[directory / FOLDER / f"{plot.name}.svg"] = svg(plot)
    for path, content in files.items():
        write_bytes(path, content, AGAIN)
    for path in _files_of_plots(directory, PLOTS):
        if path not in files:  # of an earlier run
            path.unlink(missing_ok=True)
    return list(files)


def _encodable(value: Any) -> Any:
    """Return plain data with escapes for what is no Unicode, such as bytes of a path."""
    if isinstance(value, dict):
        return {_encodable(name): _encodable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value


def _files_of_plots(directory: Path, names: Iterable[str]) -> list[Path]:
    return [directory / FOLDER / f"{name}.{form}" for name in names for form in ("png", "svg")]


def _plots(made: Document) -> list[Plot]:
    blocks = [block for section in made.sections for block in section.blocks]
    return [block for block in blocks if isinstance(block, Plot)]
