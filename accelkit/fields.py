"""Fields of settings classes: a default, a help text and a rule for the values of each.

A settings class is a frozen dataclass. A field made by :func:`setting` is an option of every
command that takes the class (:mod:`accelkit.cli.options`); any other field is set by code alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from accelkit.errors import AccelkitError

ESSENTIAL, MODEL, DATA, TRAINING = "Essential", "Model", "Data", "Training"
EVALUATION, OUTPUT, RARE = "Evaluation", "Output", "Rarely needed"
PANELS = (ESSENTIAL, MODEL, DATA, TRAINING, EVALUATION, OUTPUT, RARE)
"""The parts of a command's help, in order."""


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


COUNT = Rule("at least 1", lambda value: value >= 1)
FINITE = Rule("finite", math.isfinite)
NOT_NEGATIVE = Rule("0 or more", lambda value: 0 <= value < math.inf)
POSITIVE = Rule("above 0", lambda value: 0 < value < math.inf)
SEED = Rule("in [0, 2^32)", lambda value: 0 <= value < 2**32)
SHARE = Rule("in [0, 1]", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Rule("in [0, 1)", lambda value: 0 <= value < 1)


def one_of(*known: str) -> Rule:
    """Return the rule that a value is one of ``known``."""
    return Rule(f"one of {', '.join(known)}", lambda value: value in known)


def size(most: int) -> Rule:
    """Return the rule that a value is from 1 to ``most``."""
    return Rule(f"from 1 to {most:,}", lambda value: 1 <= value <= most)


def setting(
    default: Any,
    help: str,
    panel: str = RARE,
    *,
    flags: str = "",
    rule: Rule | None = None,
    zero_is_none: bool = False,
    metavar: str | None = None,
    envvar: str | None = None,
) -> Any:
    """Return a dataclass field that is an option of every command that takes the class.

    Args:
        default: value where nothing is given.
        help: noun phrase that stands alone.
        panel: one of :data:`PANELS`.
        flags: spellings of the option, the first one in recipes too; by default the field's name.
        rule: what a value must be, see :func:`check`.
        zero_is_none: whether 0 stands for None on the command line.
        metavar: word for the value in the help, by default its type.
        envvar: environment variable that gives the default.
    """
    about = {
        "help": help,
        "panel": panel,
        "flags": flags,
        "rule": rule,
        "zero_is_none": zero_is_none,
        "metavar": metavar,
        "envvar": envvar,
    }
    return field(default=default, metadata=about)


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "float": ((int, float), "a number"),
    "int": ((int,), "a whole number"),
    "str": ((str,), "text"),
}


def check(settings: Any, see: str = "") -> None:
    """Check a settings class: the types of its plain values and the rules of its fields.

    Args:
        settings: an instance of the class.
        see: end of the message, such as ``"; see [model]"``.

    Raises:
        AccelkitError: a value of another type, or one that breaks a rule.
    """
    for about in fields(settings):
        value = getattr(settings, about.name)
        kind, _, optional = str(about.type).partition(" | ")
        if optional and value is None:
            continue
        types, words = _KINDS.get(kind, ((object,), ""))
        a_flag_for_a_number = isinstance(value, bool) and kind in ("int", "float")
        rule = about.metadata.get("rule")
        if a_flag_for_a_number or not isinstance(value, types):
            wanted = words
        elif rule is not None and not rule.holds(value):
            wanted = rule.words
        else:
            continue
        raise AccelkitError(f"{about.name} must be {wanted}, got {value!r}{see}")


def from_table(kind: Any, values: Any, table: str) -> Any:
    """Return a dataclass built from a table of a TOML file, whose lists become tuples.

    Raises:
        AccelkitError: it is no table, or has unknown names.
    """
    if not isinstance(values, dict):
        raise AccelkitError(f"[{table}] is a table of settings, the recipe has {values!r}")
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise AccelkitError(f"unknown settings in [{table}]: {', '.join(sorted(unknown))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
