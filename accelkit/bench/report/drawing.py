"""How plots are drawn: panels of one size, in a PNG file or inline in a page as SVG.

A panel is no wider than a phone. In a file, panels are side by side above one legend. A page scales
them to the room there is, and uses its own typeface and colours, which change in dark mode.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# The colour-blind can tell the colours of Okabe and Ito apart. Here each is darkened to a contrast
# of 3 to white. A page replaces them with its variables.
INK, MUTED, RULE, PAPER = "#1c2024", "#5a626b", "#dfe2e6", "#fffffe"
COLORS = {"full": "#46505b", "schedule": "#0b66ad", "baseline": "#c4500a", "combination": "#007a5c"}
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {
    color: kind for kind, color in COLORS.items()
}
FOLDER = "plots"
"""Folder of the PNG files, next to the report."""
MARKERS = "so^DvPXph<>*d8"
SIZES = (7, 4.5, 9.5)
"""Marker sizes in points. When the markers run out, they are used again in the next size."""

_OFFSETS = [(7, 3), (7, -3), (-7, 3), (-7, -3), (0, 7), (0, -7), (9, 12), (-9, 12), (9, -12)]
_WIDTH, _TEXT = 380, 11  # a panel's width and its font size, in points; pixels in a page
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
    "text.parse_math": False,  # names may contain dollar signs
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn in every plot: a colour for its kind, a marker for itself."""

    name: str
    kind: str
    marker: str
    filled: bool
    size: float = 7

    @property
    def look(self) -> dict[str, Any]:
        """The marker as matplotlib's keywords; hollow markers hide the lines behind them."""
        color = COLORS[self.kind]
        face = color if self.filled else PAPER
        return {"ls": "", "marker": self.marker, "color": color, "mfc": face, "ms": self.size}

    def path(self) -> str:
        """Return the marker as SVG path data around the origin, for a legend."""
        from matplotlib.markers import MarkerStyle

        style = MarkerStyle(self.marker)
        outline = style.get_path().transformed(style.get_transform())
        size = self.size * 10 / SIZES[0]
        points = np.asarray(outline.to_polygons(closed_only=False)[0]) * (size, -size)
        return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) + "Z"


Point = tuple[float, float, str]
"""A point's coordinates and its label, which may be empty. Labels never cover points."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title, its content in words, and the function that draws it.

    ``draw`` takes matplotlib's axes and returns the points to label, important ones first.
    ``height`` is in points.
    """

    title: str
    alt: str
    draw: Callable[[Any], list[Point]]
    height: float = 320


@dataclass(frozen=True)
class Plot:
    """A plot of one or more panels, saved as ``name``."""

    name: str
    caption: str
    panels: list[Panel]
    legend: list[Style]

    @property
    def alt(self) -> str:
        """The plot's content in words."""
        return " ".join(panel.alt for panel in self.panels)


def png(plot: Plot) -> bytes:
    """Return the plot as a PNG file."""
    return _drawn(plot.panels, plot.legend, "png")


def inline(panel: Panel, prefix: str) -> str:
    """Return a panel as an SVG element for a page, without its title.

    Colours are variables of the page (``--ink``, ``--schedule``, …), and text is in its typeface.

    Args:
        panel: what to draw.
        prefix: a prefix for all ids, different for every panel of a page.
    """
    text = _drawn([replace(panel, title="")], [], "svg").decode()
    text = text[text.index("<svg") :]
    # A style element would apply to the whole page.
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var(--{name})")
    opening, content = text.split(">", 1)
    box = re.findall(r'viewBox="[^"]*"', opening)[0]
    return f'<svg role="img" aria-label="{html.escape(panel.alt)}" {box}>{content}'


def readable_axis(axes: Any, which: str, values: list[float]) -> None:
    """Scale an axis, x or y, to its values, with plain numbers at the ticks.

    The axis is logarithmic if the values span more than a factor of 4.
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


def _drawn(panels: list[Panel], legend: list[Style], form: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    width = columns * _WIDTH
    widest = 45 + 0.6 * _TEXT * max((len(style.name) for style in legend), default=0)
    across = max(1, int(width / widest))
    below = 18 * math.ceil(len(legend) / across) + 14 if legend else 0
    height = rows * max(panel.height for panel in panels) + below
    layout = ConstrainedLayoutEngine(rect=(0, below / height, 1, 1 - below / height))
    buffer = io.BytesIO()
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
                handles=[Line2D([], [], label=style.name, **style.look) for style in legend],
                loc="lower center",
                ncols=min(across, len(legend)),
            )
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # a new layout would move points under labels
        for axes, wanted in zip(figure.axes, points, strict=False):
            _label(axes, wanted)
        figure.savefig(buffer, format=form, dpi=160)
    return buffer.getvalue()


def _label(axes: Any, points: list[Point]) -> None:
    """Label points where there is room; earlier points choose first."""
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
