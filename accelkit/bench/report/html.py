"""A report as one web page that loads nothing: styles, plots and pictures are in it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from accelkit.bench.report.document import Block, Document, Picture
from accelkit.bench.report.drawing import Plot, inline
from accelkit.errors import AccelkitError

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_EMBEDDED = 1 << 18  # bytes of a picture above which the page has it as a JPEG
_SMALL = 480  # pixels of width below which a picture is shown at twice its size


def html(document: Document) -> str:
    """Return the report's page.

    Raises:
        AccelkitError: a picture of samples cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(kind=_kind, embedded=_embedded, panels=_panels)
    return environment.get_template(_TEMPLATE.name).render(document=document)


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _panels(plot: Plot) -> list[tuple[str, Markup]]:
    """The plot's panels: title and SVG."""
    made = []
    for index, panel in enumerate(plot.panels):
        svg = inline(panel, f"{plot.name}{index}")
        said = f'<svg role="img" aria-label="{escape(panel.alt)}" '
        made.append((panel.title, Markup(svg.replace("<svg ", said, 1))))
    return made


def _embedded(picture: Picture) -> tuple[str, int, int, bool]:
    """A picture as a data URI, width and height to show it in, and whether these are its own."""
    from PIL import Image

    try:
        data = picture.path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            image.load()  # a browser would show what is cut off, and say nothing
            form = "png"
            if len(data) > _EMBEDDED:
                held = io.BytesIO()
                image.convert("RGB").save(held, "JPEG", quality=92)
                data, form = held.getvalue(), "jpeg"
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of what is no picture
        raise AccelkitError(
            f"cannot read the samples in {picture.path} ({error}); remove them from results.json "
            "or put the picture there again"
        ) from error
    large = width >= _SMALL
    zoom = 1 if large else 2
    uri = f"data:image/{form};base64,{base64.b64encode(data).decode()}"
    return uri, zoom * width, zoom * height, large
