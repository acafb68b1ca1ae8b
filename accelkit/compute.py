"""The compute of one network call: the values that a schedule takes, and how they are spelled."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from accelkit.errors import AccelkitError

PLACEMENTS = ("all", "F", "R", "B")


@dataclass(frozen=True, slots=True)
class Merge:
    """Token merging inside self-attention (Bolya and Hoffman 2023).

    Attributes:
        ratio: share of the tokens that are merged into others, above 0 and at most 0.75.
        placement: the blocks that merge: ``all``, or ``blocks`` of them from the front ``F``, the
            rear ``R`` or both ends ``B`` (Moon et al. 2024, tables 5 to 8).
        blocks: the number of blocks that merge, 0 with ``all``; even with ``B``.
    """

    ratio: float
    placement: str = "all"
    blocks: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.ratio, (int, float)) and not isinstance(self.ratio, bool)
        if not number or not 0 < self.ratio <= 0.75 or not math.isfinite(self.ratio):
            raise AccelkitError(
                f"a merge ratio is above 0 and at most 0.75 (a quarter of the tokens stays), got "
                f"{self.ratio!r}"
            )
        if self.placement not in PLACEMENTS:
            raise AccelkitError(
                f"tokens are merged in {', '.join(PLACEMENTS)}, got {self.placement!r}"
            )
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int):
            raise TypeError(f"a number of merging blocks is whole, not {self.blocks!r}")
        if (self.placement == "all") != (self.blocks == 0) or self.blocks < 0:
            raise AccelkitError(
                f"the placements F, R and B count at least one block and 'all' none, got "
                f"{self.placement} with {self.blocks}"
            )
        if self.placement == "B" and self.blocks % 2:
            raise AccelkitError(
                f"B merges at both ends alike, so an even number, not {self.blocks}"
            )

    @classmethod
    def parse(cls, text: str) -> Merge:
        """Read ``0.3`` (every block) or ``0.3:B4`` (two blocks at either end)."""
        match = re.fullmatch(r"([0-9.eE+-]+)\s*(?::\s*(?:(all)|([FRB])(\d{1,9})))?", text.strip())
        try:
            ratio = float(match[1]) if match else math.nan
        except ValueError:
            ratio = math.nan
        if match is None or math.isnan(ratio):
            raise AccelkitError(
                f"cannot read the token merging {text!r}; write a ratio and where, e.g. 0.3, "
                "0.3:F4 (front), 0.3:R4 (rear) or 0.3:B4 (both ends)"
            )
        return cls(ratio, match[3] or "all", int(match[4] or 0))

    def __str__(self) -> str:
        where = "" if self.placement == "all" else f":{self.placement}{self.blocks}"
        return f"tome:{self.ratio:g}{where}"

    def merges(self, index: int, depth: int) -> bool:
        """Whether block ``index`` of ``depth`` merges tokens."""
        front = index < (self.blocks // 2 if self.placement == "B" else self.blocks)
        rear = depth - index <= (self.blocks // 2 if self.placement == "B" else self.blocks)
        return {"all": True, "F": front, "R": rear, "B": front or rear}[self.placement]


KNOBS: dict[str, tuple[str, Any]] = {"tome": ("merge", Merge)}
"""Knobs by the word before the colon: the field of :class:`Compute`, and the class of its value.

The class is a dataclass. Its ``parse`` reads the text after the colon, its ``str`` writes the word.
"""


@dataclass(frozen=True, slots=True)
class Compute:
    """What one call of the network spends.

    A new knob is a field here, a row of ``KNOBS``, and the place that acts on it.

    Attributes:
        depth: number of counted blocks that run, the first ones.
        merge: how tokens are merged in the attention of these blocks; None for not at all.
    """

    depth: int
    merge: Merge | None = None

    def __post_init__(self) -> None:
        if isinstance(self.depth, bool) or not isinstance(self.depth, int):
            raise TypeError(f"a depth is a whole number of blocks, not {self.depth!r}")
        if self.depth < 0:
            raise AccelkitError(f"a depth is a number of blocks, 0 or more, got {self.depth}")
        for field, kind in KNOBS.values():
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{field} is a {kind.__name__} or None, not {value!r}")

    @classmethod
    def parse(cls, text: str) -> Compute:
        """Read an interval's part of a literal: a depth, and knobs after a ``+``.

        ``28`` runs 28 blocks, ``28+tome:0.3`` merges 30% of the tokens as well.

        Raises:
            ValueError: the depth is not a whole number of at most nine digits.
            AccelkitError: a knob has no such value.
        """
        depth, knobs = split_knobs(text.strip())
        if not re.fullmatch(r"-?\d{1,9}\s*", depth):  # int() refuses thousands of digits
            raise ValueError(f"cannot read the depth {depth!r}")
        return cls(int(depth), **knobs)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Compute:
        """Return the compute of plain data; TypeError for unknown or missing keys."""
        knobs = {field: kind for field, kind in KNOBS.values() if data.get(field) is not None}
        return cls(**{**data, **{field: kind(**data[field]) for field, kind in knobs.items()}})

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, without the knobs that are not set."""
        return {"depth": self.depth, **{name: asdict(knob) for name, knob in self.knobs.items()}}

    @property
    def knobs(self) -> dict[str, Any]:
        """The knobs that are set, by field."""
        values = {field: getattr(self, field) for field, _ in KNOBS.values()}
        return {field: value for field, value in values.items() if value is not None}

    def __str__(self) -> str:
        return "+".join(map(str, (self.depth, *self.knobs.values())))


def split_knobs(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``D4+tome:0.3`` into ``D4`` and the fields of :class:`Compute` that the rest sets.

    Knobs alone leave an empty text. Knobs of a literal's intervals stay in the text: they are
    followed by an ``@``.

    Raises:
        AccelkitError: a knob has no such value.
    """
    knobs: dict[str, Any] = {}
    while True:
        before, plus, last = text.rpartition("+")
        word, colon, value = last.partition(":")
        known = KNOBS.get(word.strip().lower()) if colon and "@" not in last else None
        if known is None or known[0] in knobs or (plus and not before):
            return text, knobs
        field, kind = known
        knobs[field] = kind.parse(value)
        text = before
