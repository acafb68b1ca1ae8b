"""How plots are drawn: panels of one size, on paper as files and in a page as inline SVG.

A panel is no wider than a phone. On paper panels stand beside each other above one legend; a page
sets them as wide as there is room, in its own typeface and colours, which change with its mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# Colours of Okabe and Ito, whom the colour-blind can follow, darkened until each has a contrast of
# 3 to white; beside them every method has a marker of its own. A page replaces them by variables.
INK, MUTED, RULE, PAPER = "#1c2024", "#5a626b", "#dfe2e6", "#fffffe"
COLORS = {"full": "#46505b", "schedule": "#0b66ad", "baseline": "#c4500a", "combination": "#007a5c"}
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    color: kind for kind, color in COLORS.items()
}
FOLDER = "plots"
"""Where the files lie, beside the report."""
MARKERS = "so^DvPXph<>*d8"
SIZES = (7, 4.5, 9.5)
"""Of markers, in points: of another size they are used again."""

_OFFSETS = [(7, 3), (7, -3), (-7, 3), (-7, -3), (0, 7), (0, -7), (9, 12), (-9, 12), (9, -12)]
_WIDTH, _TEXT = 380, 11  # of a panel, in points; a page takes them for pixels
_SETTINGS: Any = {
    "svg.hashsalt": "accelkit",
    "svg.fonttype": "none",
    "font.size": _TEXT,
    "axes.titlesize": _TEXT,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,  # a name may have a dollar in it
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn wherever it appears: a colour of its kind, a marker of its own."""

    name: str
    kind: str
    marker: str
    filled: bool
    size: float = 7

    @property
    def color(self) -> str:
        """The colour on paper."""
        return COLORS[self.kind]

    @property
    def face(self) -> str:
        """What the marker is filled with; hollow ones hide the lines behind them."""
        return self.color if self.filled else PAPER

    def path(self) -> str:
        """Return the marker as the path data of an SVG, around the origin, larger than plotted."""
        from matplotlib.markers import MarkerStyle

        style = MarkerStyle(self.marker)
        outline = style.get_path().transformed(style.get_transform())
        size = self.size * 10 / SIZES[0]
        points = np.asarray(outline.to_polygons(closed_only=False)[0]) * (size, -size)
        return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + "Z"


Point = tuple[float, float, str]
"""A point that labels keep off, and what is to stand beside it, if anything."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what they show, in words, and how it is drawn.

    ``draw`` takes matplotlib's axes and returns the points drawn, the important ones first.
    ``height`` is in points.
    """

    title: str
    alt: str
    draw: Callable[[Any], list[Point]]
    height: float = 320


@dataclass(frozen=True)
class Plot:
    """A picture of one or more panels, saved under ``name``."""

    name: str
    caption: str
    panels: list[Panel]
    legend: list[Style]

    @property
    def alt(self) -> str:
        """What it shows, in words."""
        return " ".join(panel.alt for panel in self.panels)


def png(plot: Plot) -> bytes:
    """Return the plot as a PNG file."""
    return _saved(plot.panels, plot.legend, "png", dpi=160)


def svg(plot: Plot) -> bytes:
    """Return the plot as an SVG file, the same bytes whenever it is drawn."""
    return _saved(plot.panels, plot.legend, "svg", metadata={"Date": None})


def inline(panel: Panel, prefix: str) -> str:
    """Return a panel as an SVG element for a page, without its title.

    Colours are variables of the page (``--ink``, ``--schedule``, …), letters are in its typeface.

    Args:
        panel: what to draw.
        prefix: put before every id, which are the page's: it has to differ between its panels.
    """
    text = _saved([replace(panel, title="")], [], "svg", metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    # a style element in a page would be that of the whole page
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", text, count=1)
    text = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    return text


def readable_axis(axes: Any, which: str, values: list[float]) -> None:
    """Scale an axis, x or y, to its values, with plain numbers as ticks.

    It is logarithmic if they span more than a factor of 4.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = getattr(axes, f"{which}axis")
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set(**{f"{which}scale": "log"})
        wide = max(values) > 100 * min(values)
        axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _saved(panels: list[Panel], legend: list[Style], form: str, **how: Any) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    width = columns * _WIDTH
    widest = 45 + 0.6 * _TEXT * max((len(style.name) for style in legend), default=0)
    across = max(1, int(width / widest))
    below = 18 * math.ceil(len(legend) / across) + 14 if legend else 0
    height = rows * max(panel.height for panel in panels) + below
    layout = ConstrainedLayoutEngine(rect=(0, below / height, 1, 1 - below / height))
    held = io.BytesIO()
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout=layout)
        FigureCanvasAgg(figure)
        figure.subplots(rows, columns, squeeze=False)
        points = []
        for axes, panel in zip(figure.axes, panels, strict=False):
            axes.set_title(panel.title)
            points.append(panel.draw(axes))
        for axes in figure.axes[len(panels) :]:
            axes.set_visible(False)
        if legend:
            figure.legend(
                handles=[_handle(style) for style in legend],
                loc="lower center",
                ncols=min(across, len(legend)),
            )
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # labels stay where there was room for them
        for axes, wanted in zip(figure.axes, points, strict=False):
            _label(axes, wanted)
        figure.savefig(held, format=form, **how)
    return held.getvalue()


def _handle(style: Style) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        ls="",
        marker=style.marker,
        color=style.color,
        mfc=style.face,
        ms=style.size,
        label=style.name,
    )


def _label(axes: Any, points: list[Point]) -> None:
    """Write beside each point what it is, where there is room; earlier ones choose first."""
    from matplotlib.transforms import Bbox

    inside, reach = axes.get_window_extent(), 5
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in centres]
    for x, y, text in points:
        for right, up in _OFFSETS if text else ():
            note = axes.annotate(
                text,
                (x, y),
                (right, up),
                textcoords="offset points",
                ha="left" if right > 0 else "right" if right < 0 else "center",
                va="bottom" if up > 0 else "top",
                fontsize=_TEXT - 1,
            )
            box = note.get_window_extent().padded(1)
            within = all(inside.contains(*corner) for corner in box.corners())
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()
