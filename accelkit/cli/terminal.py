"""Messages on standard error, and output that any terminal can show."""

from __future__ import annotations

import codecs
import os
import sys
import warnings
from typing import Any

from accelkit.errors import LONGEST, AccelkitError, AccelkitWarning, one_line

_PREFIX = "accelkit: "
_PLAINLY = {"…": "...", "–": "-", "→": "->", "×": "x"}
_PLAINLY |= dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True))


def say(message: object) -> None:
    """Print a message as one line of at most :data:`accelkit.errors.LONGEST` characters."""
    # typer.echo would write UTF-8 even to a terminal that shows ASCII only.
    print(_PREFIX + one_line(message, LONGEST - len(_PREFIX)), file=sys.stderr, flush=True)


def worded(error: Exception) -> str | None:
    """Return the message for a user's error, None for a fault of accelkit."""
    if isinstance(error, AccelkitError):
        return str(error)
    if isinstance(error, (TypeError, OSError)):
        return f"{type(error).__name__}: {error}"
    message = getattr(error, "format_message", None)  # the parser would draw a box
    return message and f"{message()} See --help."


def show_anywhere() -> None:
    """Escape characters that the terminal's encoding lacks, in output and messages.

    A path may hold bytes that are not UTF-8, and a terminal may show ASCII only. Neither should end
    a command that has done its work.
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
    """Print accelkit's warnings like its errors, in a line without the place in the code."""
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, AccelkitWarning):
            say(f"warning: {message}")
        else:
            shown(message, category, *rest, **more)

    warnings.showwarning = show


def quiet() -> None:
    """Silence notices of diffusers and transformers, if they are not imported yet."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
