"""What accelkit raises and warns with: one line that says what was given and what to do."""

import re
import signal

LONGEST = 400
"""Characters of a message: what a terminal shows at a glance."""
_LONG_WORD = 80


def one_line(text: object, longest: int = LONGEST) -> str:
    """Return ``text`` as one printable line of at most ``longest`` characters.

    A message begins with what was given and ends with what to do, so the middle is cut: of long
    words first, which are what a user gave in place of a name or a path, then of the line. What
    does not print, such as the bytes of a path that are no UTF-8, is escaped.
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
    """A user's input that cannot be used: what was given, what was expected, what to do.

    Its text is one line of at most :data:`LONGEST` characters; ``args`` keep all of it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class AccelkitWarning(UserWarning):
    """Something that works but is probably not what was meant."""


class Stopped(Exception):  # noqa: N818 - no error: the run can go on
    """A run was asked to end by a signal, and left a checkpoint.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; "
            "go on with --resume latest"
        )
        self.signum = signum
