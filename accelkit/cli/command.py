"""Commands whose options are the fields of settings classes.

A command is a function whose parameters are settings classes. :func:`command` gives it an option
for every field made by :func:`accelkit.fields.setting`, and calls it with instances built from the
command line, the recipe and the layers below. A new field is thus an option with its check and its
help, and nothing more has to be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from accelkit.cli.options import Option, Options, name_value, options_of, single
from accelkit.cli.settings import read_recipe, resolve
from accelkit.cli.show import show_settings
from accelkit.errors import AccelkitError
from accelkit.fields import ESSENTIAL, OUTPUT, PANELS, RARE, from_table, setting


class RecipeTable:
    """Marks a settings class that is the recipe's table of the parameter's name."""


@dataclass(frozen=True)
class Call:
    """How a command is called; a command that takes one has a recipe and a dry run."""

    recipe: Path | None = setting(None, "TOML file that sets any of these options", ESSENTIAL)
    dry_run: bool = setting(False, "Resolved settings printed, nothing run", OUTPUT)
    json: bool = setting(False, "JSON in place of tables", OUTPUT, flags="--json")
    settings: Mapping[str, Any] = field(default_factory=dict)

    def is_dry_run(self) -> bool:
        """Return whether nothing is to be run, after printing the settings if so."""
        if self.dry_run:
            hidden = {f.name for f in fields(self)}
            show_settings({k: v for k, v in self.settings.items() if k not in hidden}, self.json)
        return self.dry_run


AsJson = single(Call, "json")
Layer = Callable[..., dict[str, Any]]
"""Takes a command's parameters as built so far; returns settings of lower precedence, by option or
in a dictionary for each parameter that is a settings class."""


def command(*layers: Layer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that makes a function of settings classes a command for typer.

    A setting is taken from the command line, else the recipe, else the first of ``layers`` that has
    it, else the parameter's default.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        return _Command(function, layers).for_typer()

    return decorate


class _Command:
    """A function of settings classes, and its options."""

    def __init__(self, function: Callable[..., None], layers: tuple[Layer, ...]) -> None:
        self.function, self.layers = function, layers
        self.tables: dict[str, type] = {}
        self.defaults: dict[str, Any] = {}
        self.options: list[Option] = []
        self.plain: list[str] = []
        self.parameters: list[Parameter] = []
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in signature(function).parameters.items():
            kind, about = _split(hints[name])
            if about is RecipeTable:
                self.tables[name] = kind
            elif is_dataclass(kind):
                empty = parameter.default is Parameter.empty
                self.defaults[name] = default = kind() if empty else parameter.default  # type: ignore[operator]
                made = options_of(name, default, about or Options())
                self.options += made
                self.parameters += [option.parameter() for option in made]
            else:
                name_value(kind, about)
                self.plain.append(name)
                self.parameters.append(
                    parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name])
                )

    def for_typer(self) -> Callable[..., None]:
        """Return the function that typer sees, with a parameter for each option."""

        def run(ctx: typer.Context, **_: Any) -> None:
            self.function(**self._built(self._resolved(ctx)))

        context = Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *sorted(self.parameters, key=_place)]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.tables = self.tables  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = self.function.__name__, self.function.__doc__
        return run

    def _resolved(self, ctx: typer.Context) -> dict[str, Any]:
        """Return the settings by option, and the recipe's tables."""
        recipe = ctx.params.get("recipe")
        given = read_recipe(recipe, tuple(self.tables)) if recipe else {}
        tables = {name: given.pop(name, {}) for name in self.tables}
        found = [given]
        for layer in self.layers:
            settings = self._built(resolve(ctx, *found) | tables)
            found.append(self._by_option(layer(**settings)))
        return resolve(ctx, *found) | tables

    def _by_option(self, layer: Mapping[str, Any]) -> dict[str, Any]:
        """Return a layer's settings by option."""
        names = {(option.part, option.about.name): option for option in self.options}
        found: dict[str, Any] = {}
        for part, settings in layer.items():
            if part not in self.defaults:
                found[part] = settings
                continue
            for name, value in settings.items():
                option = names.get((part, name))
                spelled = option.spelled(value) if option else value
                if spelled is not None:
                    found[option.name if option else name] = spelled
        return found

    def _built(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the function's arguments for settings by option."""
        built: dict[str, Any] = {name: settings[name] for name in self.plain}
        for name, kind in self.tables.items():
            built[name] = from_table(kind, settings[name], name)
        for part, default in self.defaults.items():
            own = [option for option in self.options if option.part == part]
            changes = {option.about.name: option.read(settings[option.name]) for option in own}
            if isinstance(default, Call):
                changes["settings"] = settings
            try:
                built[part] = replace(default, **changes)
            except AccelkitError as error:
                raise AccelkitError(_by_flag(str(error), own)) from error
        return built


def _by_flag(message: str, options: list[Option]) -> str:
    """Return a field's refusal with the option in place of the field, where the names differ."""
    for option in options:
        field_name, rest = option.about.name, " must be "
        if option.name != field_name and message.startswith(field_name + rest):
            flag = max(option.flags, key=len)
            return flag + message.removeprefix(field_name)
    return message


def _split(annotation: Any) -> tuple[Any, Any]:
    """Return the type of an annotation, and the object that ``Annotated`` adds, or None."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[:2]
    return annotation, None


def _place(parameter: Parameter) -> int:
    """Return the place of a parameter in the help; positional arguments come first."""
    _, about = _split(parameter.annotation)
    if isinstance(about, typer.models.ArgumentInfo):
        return -1
    return PANELS.index(about.rich_help_panel or RARE)
