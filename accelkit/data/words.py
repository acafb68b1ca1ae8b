"""Parts of messages about data: reasons, counts of files, classes and their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath

from accelkit.errors import AccelkitError, one_line

_SUFFIXES = 5
"""Number of suffixes that a message counts one by one."""


def reason(error: Exception) -> str:
    """Return why a file cannot be read: accelkit's own words, or the exception's with its type."""
    return str(error) if isinstance(error, AccelkitError) else f"{type(error).__name__}: {error}"


def by_suffix(paths: Iterable[PurePosixPath]) -> str:
    """Return the number of files of each suffix, such as ``3 .gif, 1 .tif``."""
    counts = Counter(path.suffix.lower() for path in paths)
    found = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [
        f"{n:,} {one_line(suffix, 12) or 'without a suffix'}" for suffix, n in found[:_SUFFIXES]
    ]
    if rest := sum(n for _, n in found[_SUFFIXES:]):
        shown.append(f"{rest:,} others")
    return ", ".join(shown)


def labelled(names: Mapping[int, str]) -> str:
    """Return classes with their labels, such as ``cat=0, dog=1``, without the middle of many."""
    each = [f"{one_line(name, 40)}={label}" for label, name in sorted(names.items())]
    shown, length = 0, 0
    while shown < len(each) and length + len(each[shown]) < 160:
        length += len(each[shown]) + 2
        shown += 1
    if shown >= len(each) - 1:
        return ", ".join(each)
    return f"{', '.join(each[:shown])}, …, {each[-1]} ({len(each):,} classes)"
