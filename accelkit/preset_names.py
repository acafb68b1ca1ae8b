"""The registry of named schedules: which names a backbone family knows, and what makes each.

It is below :mod:`accelkit.schedule`, which asks it for names that it cannot read itself. The
published schedules are registered by :mod:`accelkit.presets`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelkit.compute import split_knobs
from accelkit.errors import AccelkitError

if TYPE_CHECKING:
    from accelkit.schedule import Schedule

    Preset = Callable[[int], Schedule]
    OptionedPreset = Callable[[int, str], Schedule]

SEQUENTIAL = "dit"
"""The family whose presets all models use whose blocks run one after another."""


@dataclass
class _Family:
    presets: dict[str, Preset]
    least: int


_families: dict[str, _Family] = {SEQUENTIAL: _Family({}, 1)}
_everywhere: dict[str, OptionedPreset] = {}


def register_presets(family: str, presets: dict[str, Preset], least: int = 1) -> None:
    """Make a backbone family's named schedules known to :meth:`Schedule.parse`.

    Args:
        family: the family's name.
        presets: a function per name, called with the model's number of counted blocks.
        least: the least depth that the family can run.
    """
    known = _families.setdefault(family, _Family({}, least))
    known.presets.update(presets)
    known.least = least


def register_for_all(presets: dict[str, OptionedPreset]) -> None:
    """Make named schedules known to :meth:`Schedule.parse` for every family.

    Args:
        presets: a function per name, called with the model's number of counted blocks and the
            options after a colon, "" if there are none. Names are read in any case.
    """
    _everywhere.update({name.lower(): make for name, make in presets.items()})


def is_preset(text: str) -> bool:
    """Return whether a text names a preset of some family; options and knobs are ignored.

    Raises:
        AccelkitError: a knob cannot be read.
    """
    name = split_knobs(text.strip())[0].partition(":")[0].lower()
    named = [preset.lower() for family in _families.values() for preset in family.presets]
    return name in _everywhere or name in named


def least_depth(family: str) -> int:
    """Return the least depth that a family can run."""
    return _families[preset_family(family)].least


def preset_family(family: str) -> str:
    """Return the family whose presets a family uses: itself if it has any."""
    return family if family in _families else SEQUENTIAL


def families() -> tuple[str, ...]:
    """Return the families that have presets of their own."""
    return tuple(_families)


def preset_names(family: str = SEQUENTIAL) -> tuple[str, ...]:
    """Return the names of a family's own presets."""
    return tuple(_families[preset_family(family)].presets)


def common_presets() -> tuple[str, ...]:
    """Return the names of the presets that every family knows."""
    return tuple(_everywhere)


def make_preset(word: str, family: str, depth: int) -> Schedule:
    """Return the schedule called ``word`` for a model of ``depth`` counted blocks.

    Raises:
        AccelkitError: the family knows no such name, or its options cannot be read.
    """
    known = {name.lower(): make for name, make in _families[family].presets.items()}
    if word.lower() in known:
        return known[word.lower()](depth)
    name, _, options = word.partition(":")
    if name.lower() in _everywhere:
        return _everywhere[name.lower()](depth, options)
    names = [*preset_names(family), *_everywhere, "full", "uniform:K"]
    likeness = difflib.SequenceMatcher(b=word.lower())

    def unlike(name: str) -> float:
        likeness.set_seq1(name.lower())
        return -likeness.ratio()

    whose = "" if family == SEQUENTIAL else f" for the {family} family"
    shown = ", ".join(sorted(names, key=unlike))  # of names equally near, the family's own first
    raise AccelkitError(
        f"unknown schedule {word!r}{whose}; known, nearest first: {shown}; "
        "or depths at upper edges such as 28@0.5,14@1, or a .toml or .json file"
    )
