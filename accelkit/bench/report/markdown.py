"""A report as Markdown, of the kind with tables."""

from __future__ import annotations

import re
from functools import singledispatch

from accelkit.bench.report.document import (
    Block,
    Cell,
    Document,
    Facts,
    Paragraph,
    Pictures,
    Points,
    Table,
)
from accelkit.bench.report.drawing import FOLDER, Plot


def markdown(document: Document) -> str:
    """Return the report's text; plots and pictures are linked beside it."""
    parts = [f"# {escaped(document.title)}", escaped(document.lead)]
    for section in document.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|~!#$@])", r"\\\1", text)
    return re.sub(r"^(\d*)([-+=](?=\s)|[.)](?=\s))", r"\1\\\2", text)  # no list, no heading


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"no Markdown for {type(block).__name__}")


@_block.register
def _(block: Paragraph) -> str:
    return escaped(block.text)


@_block.register(Points)
@_block.register(Facts)
def _(block: Points | Facts) -> str:
    return "\n".join(f"- **{escaped(term)}:** {escaped(text)}" for term, text in block.items)


@_block.register
def _(block: Table) -> str:
    lines = [f"**{escaped(block.caption)}**", ""]
    lines.append(_line([escaped(column.heading) for column in block.columns]))
    lines.append(_line(["--:" if column.numeric else ":--" for column in block.columns]))
    lines += [_line([_cell(cell, block) for cell in row]) for row in block.rows]
    notes = [f"{number}. {escaped(text)}" for number, text in enumerate(block.footnotes, 1)]
    paragraphs = ["\n".join(lines), *map(escaped, block.notes)]
    return "\n\n".join([*paragraphs, *(["\n".join(notes)] if notes else [])])


@_block.register
def _(block: Plot) -> str:
    return f"![{escaped(block.alt)}]({FOLDER}/{block.name}.png)\n\n{escaped(block.caption)}"


@_block.register
def _(block: Pictures) -> str:
    return "\n\n".join(
        f"{escaped(item.title)}\n\n![{escaped(item.alt)}](<{item.file}>)" for item in block.items
    )


def _cell(cell: Cell, table: Table) -> str:
    text = escaped(cell.text)
    text = f"**{text}**" if cell.strong else text
    mark = table.mark(cell)
    return f"{text} <sup>{mark}</sup>" if mark else text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
