"""Errors and warnings of accelkit: one line with the value given and what to do."""

import re
import signal

LONGEST = 400
"""Most characters of a message, a few lines of a terminal."""
_LONG_WORD = 80


def one_line(text: object, longest: int = LONGEST) -> str:
    """Return ``text`` as one printable line of at most ``longest`` characters.

    A message begins with the value given and ends with what to do, so the middle is cut: first of
    long words, which are usually values, then of the line. Characters that do not print, such as
    the bytes of a path that is no UTF-8, are escaped.
    """
    line = " ".join(str(text).split())
    if len(line) > longest:
        line = re.sub(rf"\S{{{_LONG_WORD + 1},}}", lambda word: _cut(word[0], _LONG_WORD), line)
        line = _cut(line, longest)
    return _cut("".join(map(_escaped, line)), longest)


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    head = (longest - 1) * 2 // 5
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


class AccelkitError(ValueError):
    """An input that cannot be used: what was given, what was expected, what to do.

    Its text is one line of at most :data:`LONGEST` characters; ``args`` hold the whole message.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class AccelkitWarning(UserWarning):
    """An input that works but is probably not the intended one."""


class Stopped(Exception):  # noqa: N818 - not an error: the run can go on
    """A run ended on a signal, after writing a checkpoint.

    Attributes:
        signum: number of the signal.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; "
            "go on with --resume latest"
        )
        self.signum = signum
