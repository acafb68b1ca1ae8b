"""Settings of a command from the command line, a recipe and layers of lower precedence."""

from __future__ import annotations

import difflib
import os.path
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.files.documents import read_toml


def read_recipe(path: str | Path, tables: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings of a recipe, a TOML file of options; dashes become underscores.

    Args:
        path: the file.
        tables: names of tables that stay tables; every other table only groups options.

    Raises:
        AccelkitError: the file is missing or not valid TOML.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise AccelkitError(f"no recipe at {path}")
    flat: dict[str, Any] = {}
    for key, value in read_toml(path, "the recipe").items():
        grouped = value if isinstance(value, dict) and key not in tables else {key: value}
        for name, setting in grouped.items():
            if (name := name.replace("-", "_")) in flat:
                raise AccelkitError(f"the recipe {path} sets {name} twice; leave one out")
            flat[name] = setting
    return flat


def resolve(context: Any, *layers: dict[str, Any]) -> dict[str, Any]:
    """Return a command's settings: from the command line, else the first layer, else the default.

    An environment variable counts as a default: ``accelerate launch`` always sets some.

    Args:
        context: the command's click context.
        layers: settings by option name, the most important first.

    Raises:
        AccelkitError: a layer holds an unknown name or a value of the wrong kind.
    """
    known = {parameter.name: parameter for parameter in context.command.params}
    spelled = {
        option.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("--")
    }
    settings = dict(context.params)
    for layer in reversed(layers):
        for name, value in layer.items():
            parameter = known.get(name) or spelled.get(name)
            if parameter is None:
                near = difflib.get_close_matches(name, spelled, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise AccelkitError(f"unknown setting {name!r} in the recipe{hint}")
            source = context.get_parameter_source(parameter.name)
            if source is None or source.name != "COMMANDLINE":
                settings[parameter.name] = _cast(context, parameter, value)
    return settings


def _cast(context: Any, parameter: Any, value: Any) -> Any:
    plain = isinstance(value, (str, int, float, bool))
    flags = getattr(parameter, "is_flag", False)
    if not plain or isinstance(value, bool) != bool(flags):
        kind = "true or false" if flags else "one value"
        raise AccelkitError(f"{parameter.name} takes {kind}, the recipe has {value!r}")
    try:
        return value if flags else parameter.process_value(context, str(value))
    except Exception as error:  # BadParameter of click, which versions of typer keep elsewhere
        message = getattr(error, "message", str(error))
        raise AccelkitError(f"{parameter.name} in the recipe: {message}") from error
