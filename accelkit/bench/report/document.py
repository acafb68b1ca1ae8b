"""What a report is made of, and how it is written as a web page and as Markdown.

The page loads nothing: styles, plots and pictures are part of it.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from accelkit.bench.report.drawing import FOLDER, Plot, inline
from accelkit.errors import AccelkitError

MISSING = "–"
MINUS = "−"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_LARGEST_PNG = 1 << 18  # bytes; larger pictures are embedded as JPEG
_SMALL = 480  # pixels; narrower pictures are shown at twice their size


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    ``reason`` becomes a footnote: why there is a dash, or what to know about the figure.
    """

    text: str
    reason: str | None = None
    strong: bool = False


@dataclass(frozen=True)
class Column:
    """A column's heading. Numbers are set right-aligned, and prose may break into lines."""

    heading: str
    numeric: bool = True
    prose: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows, with notes below it."""

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    @property
    def footnotes(self) -> list[str]:
        """The distinct reasons of the cells, in order of appearance."""
        return list(dict.fromkeys(c.reason for row in self.rows for c in row if c.reason))

    def mark(self, cell: Cell) -> int | None:
        """Return the number of a cell's footnote."""
        return self.footnotes.index(cell.reason) + 1 if cell.reason else None


@dataclass(frozen=True)
class Terms:
    """Terms, each with a text about it; set small if ``compact``."""

    items: list[tuple[str, str]]
    compact: bool = False


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A row of generated images, in the file ``path``, which the report links as ``file``."""

    title: str
    alt: str
    file: str
    path: Path


@dataclass(frozen=True)
class Pictures:
    """Rows of generated images to compare, one below the other."""

    items: list[Picture]


Block = Paragraph | Terms | Table | Plot | Pictures


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it."""

    key: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    lead: str
    sections: list[Section]


def fixed(value: float, places: int) -> str:
    """Return ``value`` with a fixed number of decimals and commas between thousands."""
    return f"{value:z,.{places}f}".replace("-", MINUS)  # z: no minus before a zero


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{fixed(100 * share, 1)}%"


def decimals(values: Iterable[float | None], most: int = 5) -> int:
    """Return the number of decimals, up to ``most``, that shows the smallest value to three digits.

    One number of decimals for a whole column keeps its decimal points aligned.
    """
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 0
    return min(max(2 - math.floor(math.log10(min(sizes))), 0), most)


def significant(value: float) -> str:
    """Return ``value`` in running text, to three digits."""
    return fixed(value, decimals([value], most=9))


def plural(n: int, noun: str) -> str:
    """Return a number and a noun whose plural ends in s."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def enumerated(items: list[str]) -> str:
    """Return ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def markdown(document: Document) -> str:
    """Return the report as Markdown with tables; plots and pictures are links."""
    parts = [f"# {_escaped(document.title)}", _escaped(document.lead)]
    for section in document.sections:
        parts.append(f"## {_escaped(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return _escaped(text)
        case Terms(items):
            return "\n".join(f"- **{_escaped(term)}:** {_escaped(text)}" for term, text in items)
        case Table():
            return _table(block)
        case Plot():
            picture = f"![{_escaped(block.alt)}]({FOLDER}/{block.name}.png)"
            return f"{picture}\n\n{_escaped(block.caption)}"
        case Pictures(pictures):
            return "\n\n".join(
                f"{_escaped(picture.title)}\n\n![{_escaped(picture.alt)}](<{picture.file}>)"
                for picture in pictures
            )


def _table(table: Table) -> str:
    lines = [f"**{_escaped(table.caption)}**", ""]
    lines.append(_line(_escaped(column.heading) for column in table.columns))
    lines.append(_line("--:" if column.numeric else ":--" for column in table.columns))
    lines += [_line(_cell(cell, table) for cell in row) for row in table.rows]
    parts = ["\n".join(lines), *map(_escaped, table.notes)]
    if table.footnotes:
        numbered = enumerate(table.footnotes, 1)
        parts.append("\n".join(f"{number}. {_escaped(text)}" for number, text in numbered))
    return "\n\n".join(parts)


def _cell(cell: Cell, table: Table) -> str:
    text = _escaped(cell.text)
    text = f"**{text}**" if cell.strong else text
    mark = table.mark(cell)
    return f"{text} <sup>{mark}</sup>" if mark else text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Return one line that Markdown shows literally."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|~!#$@])", r"\\\1", text)
    return re.sub(r"^(\d*)([-+=](?=\s)|[.)](?=\s))", r"\1\\\2", text)  # no list, no heading


def html(document: Document) -> str:
    """Return the report as a web page.

    Raises:
        AccelkitError: a picture of samples cannot be read.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        kind=lambda block: type(block).__name__.lower(), inline=inline, embedded=_embedded
    )
    return environment.get_template(_TEMPLATE.name).render(document=document)


def _embedded(picture: Picture) -> tuple[str, int, int, bool]:
    """Return a picture's data URI, the size to show it at, and whether that is its own size."""
    from PIL import Image

    try:
        data = picture.path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.load()  # browsers show truncated files without a warning
            form = "png"
            if len(data) > _LARGEST_PNG:
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, "JPEG", quality=92)
                data, form = buffer.getvalue(), "jpeg"
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for bad files
        raise AccelkitError(
            f"cannot read the samples in {picture.path} ({error}); restore the picture, or remove "
            "its entry from results.json"
        ) from error
    large = width >= _SMALL
    zoom = 1 if large else 2
    uri = f"data:image/{form};base64,{base64.b64encode(data).decode()}"
    return uri, zoom * width, zoom * height, large
