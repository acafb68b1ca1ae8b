"""Messages about data: one line each, whatever file names hold, and counts of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from accelkit.errors import AccelkitError

LONGEST = 400
"""Characters of a message."""


def one_line(text: str, most: int = LONGEST) -> str:
    """Return ``text`` without line breaks and control characters, its middle cut if too long.

    A file's name may hold either, and bytes that are no text. Messages begin with what was given
    and end with what to do, so both ends are kept.
    """
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(plain) <= most:
        return plain
    end = most * 3 // 8
    return f"{plain[: most - end - 1]}…{plain[-end:]}"


def refusal(text: str) -> AccelkitError:
    """Return the error to raise for data that cannot be used."""
    return AccelkitError(one_line(text))


def reason(error: Exception) -> str:
    """Return why a file cannot be read: accelkit's own words, or the exception's with its type."""
    return str(error) if isinstance(error, AccelkitError) else f"{type(error).__name__}: {error}"


def by_suffix(paths: Iterable[PurePosixPath]) -> str:
    """Return how many files have which suffix, such as ``3 .gif, 1 .tif``."""
    counts = Counter(path.suffix.lower() for path in paths)
    shown = [f"{n:,} {one_line(suffix, 12) or 'without a suffix'}" for suffix, n in _most(counts)]
    return ", ".join(shown)


def labelled(names: Mapping[int, str]) -> str:
    """Return which class has which label, such as ``cat=0, dog=1``; the middle of many left out."""
    each = [f"{one_line(name, 40)}={label}" for label, name in sorted(names.items())]
    shown, length = 0, 0
    while shown < len(each) and length + len(each[shown]) < 160:
        length += len(each[shown]) + 2
        shown += 1
    if shown >= len(each) - 1:
        return ", ".join(each)
    return f"{', '.join(each[:shown])}, …, {each[-1]} ({len(each):,} classes)"


def _most(counts: Counter[str], shown: int = 5) -> list[tuple[str, int]]:
    """Return the commonest entries, in an order that does not depend on the file system."""
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(n for _, n in found[shown:])
    return [*found[:shown], *([("others", rest)] if rest else [])]
