"""Messages on standard error, and output that any terminal can show."""

from __future__ import annotations

import codecs
import sys
import warnings
from typing import Any

from accelkit.errors import LONGEST, AccelkitError, AccelkitWarning, one_line

_PREFIX = "accelkit: "
_PLAINLY = {"…": "...", "–": "-", "→": "->", "×": "x"}
_PLAINLY |= dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True))


def say(message: object) -> None:
    """Print a message as one line of at most :data:`accelkit.errors.LONGEST` characters."""
    # typer.echo would write UTF-8 to a terminal that knows ASCII only
    print(_PREFIX + one_line(message, LONGEST - len(_PREFIX)), file=sys.stderr, flush=True)


def worded(error: Exception) -> str | None:
    """Return what a user is told of an error, None for one that is a fault of accelkit."""
    if isinstance(error, AccelkitError):
        return str(error)
    if isinstance(error, (TypeError, OSError)):
        return f"{type(error).__name__}: {error}"
    message = getattr(error, "format_message", None)  # of the parser, which would draw it in a box
    return message and f"{message()} See --help."


def show_anywhere() -> None:
    """Have output and messages escape what the terminal's encoding lacks.

    A path may hold bytes that are no UTF-8, and a terminal may know ASCII only; neither should end
    a command that did its work.
    """
    codecs.register_error("accelkit", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="accelkit")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    plain = (_PLAINLY.get(c) or c.encode("unicode_escape").decode("ascii") for c in lacking)
    return "".join(plain), error.end


def show_warnings_as_lines() -> None:
    """Print accelkit's warnings as its errors are: where in the code they arose tells nothing."""
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, AccelkitWarning):
            say(f"warning: {message}")
        else:
            shown(message, category, *rest, **more)

    warnings.showwarning = show
