"""Numbers as a report shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable

MINUS = "−"


def fixed(value: float, decimals: int) -> str:
    """Return ``value`` with so many decimals, thousands set apart."""
    return f"{value:z,.{decimals}f}".replace("-", MINUS)  # z: no minus before a zero


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{fixed(100 * share, 1)}%"


def decimals(values: Iterable[float | None], digits: int = 3, most: int = 5) -> int:
    """Return how many decimals show the smallest of a column's values in ``digits`` digits.

    One number of decimals for a column keeps its points below each other. It is at most ``most``.
    """
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return 0
    return min(max(digits - 1 - math.floor(math.log10(min(sizes))), 0), most)


def significant(value: float, digits: int = 3) -> str:
    """Return ``value`` in running text, to so many digits."""
    return fixed(value, decimals([value], digits, most=9))


def counted(n: int, one: str) -> str:
    """Return ``n`` and a noun whose plural ends in s."""
    return f"{n:,} {one}" if n == 1 else f"{n:,} {one}s"


def listed(items: list[str]) -> str:
    """Return items as English lists them."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
