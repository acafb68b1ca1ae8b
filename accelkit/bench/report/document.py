"""What a report is made of, before it becomes a web page or Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from accelkit.bench.report.drawing import Plot

MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """What a table shows in one place.

    ``reason`` becomes a footnote: why there is a dash, or what to know of a figure.
    """

    text: str
    reason: str | None = None
    strong: bool = False


@dataclass(frozen=True)
class Column:
    """A column's heading; numbers are set right-aligned, and prose may break into lines."""

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
        """The cells' reasons, each once, in the order they are met."""
        return list(dict.fromkeys(c.reason for row in self.rows for c in row if c.reason))

    def mark(self, cell: Cell) -> int | None:
        """Return the number of a cell's footnote."""
        return self.footnotes.index(cell.reason) + 1 if cell.reason else None


@dataclass(frozen=True)
class Points:
    """Statements, each with the word or two that it is about."""

    items: list[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """Terms and what they are, here."""

    items: list[tuple[str, str]]


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Picture:
    """A row of generated images: ``path`` is where it lies, ``file`` what the report calls it."""

    title: str
    alt: str
    file: str
    path: Path


@dataclass(frozen=True)
class Pictures:
    """Rows of generated images to be looked at one under the other."""

    items: list[Picture]


Block = Paragraph | Points | Facts | Table | Plot | Pictures


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    key: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    lead: str
    sections: list[Section]
