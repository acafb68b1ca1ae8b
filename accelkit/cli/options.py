"""Options of the command line, made from the fields of settings classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from accelkit.bench.protocol import Protocol, listed
from accelkit.errors import AccelkitError
from accelkit.jobs.settings import Run

DATA_ONLY = ("data", "class_map", "skip_bad", "flip")
MODEL_ONLY = ("model", "revision", "variant", "vae", "num_heads")
"""Fields of :class:`accelkit.jobs.settings.Source`, for commands that need only these."""
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Options:
    """Which fields of a settings class are options of a command, and under which names.

    Attributes:
        only: fields, all by default.
        without: fields that are no options.
        named: flags by field, in place of the field's own flags.
    """

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether a field is an option."""
        return name not in self.without and (not self.only or name in self.only)


@dataclass(frozen=True)
class Option:
    """An option of a command: a field of the settings class of one of its parameters."""

    part: str  # the command's parameter
    about: Field[Any]
    kind: Any  # the field's type
    flags: tuple[str, ...]
    default: Any

    @property
    def name(self) -> str:
        """Name of the option in recipes, and of the parameter that typer sees."""
        long = [flag for flag in self.flags if flag.startswith("--")]
        return long[0][2:].replace("-", "_") if long else self.about.name

    def parameter(self) -> Parameter:
        """Return the parameter of which typer makes the option."""
        kind = self.kind
        if self._is_tuple:
            kind = str
        elif self.about.metadata["zero_is_none"]:
            kind = int
        option = typer.Option(
            *self.flags,
            help=self.about.metadata["help"],
            metavar=self.about.metadata["metavar"],
            envvar=self.about.metadata["envvar"],
            rich_help_panel=self.about.metadata["panel"],
        )
        name_value(kind, option)
        return Parameter(
            self.name,
            Parameter.KEYWORD_ONLY,
            default=self.spelled(self.default),
            annotation=Annotated[kind, option],
        )

    @property
    def _is_tuple(self) -> bool:
        return get_origin(self.kind) is tuple

    def spelled(self, value: Any) -> Any:
        """Return a field's value as it is given on the command line."""
        if self._is_tuple:
            return ",".join(map(str, value))
        return 0 if value is None and self.about.metadata["zero_is_none"] else value

    def read(self, value: Any) -> Any:
        """Return the field's value for one that was given on the command line."""
        if self._is_tuple:
            whole = get_args(self.kind)[0] is int
            return self._sizes(value) if whole else tuple(listed(value))
        optional = type(None) in get_args(self.kind)
        return None if optional and value in (0, "") else value

    def _sizes(self, text: str) -> tuple[int, ...]:
        parts = listed(text)
        if not all(part.isdecimal() and len(part) < 10 for part in parts):  # int() has a limit
            option = self.name.replace("_", "-")
            raise AccelkitError(f"--{option} takes batch sizes such as 1,8,64, got {text!r}")
        return tuple(int(part) for part in parts)


def options_of(part: str, default: Any, which: Options) -> list[Option]:
    """Return the options that the fields of a settings class make.

    Args:
        part: the command's parameter.
        default: an instance with the options' defaults, or the class.
        which: the fields to take.
    """
    kind = default if isinstance(default, type) else type(default)
    hints = get_type_hints(kind)
    found = []
    for about in fields(kind):
        if about.metadata.get("help") and which.has(about.name):
            flags = which.named.get(about.name, about.metadata["flags"])
            value = getattr(default, about.name, None)
            found.append(Option(part, about, hints[about.name], tuple(flags.split()), value))
    return found


def name_value(kind: Any, about: Any) -> None:
    """Set the word for an option's value in the help; versions of typer disagree about it."""
    if isinstance(about, typer.models.OptionInfo) and about.metavar is None:
        plain = next(iter(get_args(kind)), kind)
        about.metavar = _METAVARS.get(plain)


def single(kind: type, name: str) -> Any:
    """Return the annotation of a parameter that is one field of a settings class."""
    (found,) = options_of("", kind, Options(only=(name,)))
    return found.parameter().annotation


Overwrite = single(Run, "overwrite")
Kernels = single(Protocol, "kernels")
Labels = single(Protocol, "labels")
Seed = single(Protocol, "seed")
