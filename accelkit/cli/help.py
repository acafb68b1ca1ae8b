"""The help of a command: a panel for each group of options, with every name in full."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperArgument, TyperCommand

from accelkit.cli.show import out
from accelkit.errors import AccelkitError
from accelkit.fields import PANELS, RARE

_BITS = 64  # of an integer in torch, with its sign
_ARGUMENTS = "Arguments"


class Command(TyperCommand):
    """A command that shows its options in panels, and refuses integers beyond 64 bits."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, after checking the size of its integers."""
        for name, value in ctx.params.items():
            whole = isinstance(value, int) and name != "seed"  # the seed has a check of its own
            if whole and value.bit_length() >= _BITS:
                option = name.replace("_", "-")
                raise AccelkitError(f"--{option} takes numbers below 2^{_BITS - 1}, got {value}")
        return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help; typer would cut the names of options to fit its columns."""
        out.print(self.get_usage(ctx), highlight=False)
        out.print()
        out.print(inspect.cleandoc(self.help or ""), highlight=False)
        out.print()
        for title in (_ARGUMENTS, *PANELS):
            shown: list[Any] = [p for p in self.get_params(ctx) if _panel(p) == title]
            _print(title, [(_name(p), _help(p.help, p.default, p.envvar)) for p in shown])
        for name, kind in getattr(self.callback, "tables", {}).items():
            rows = [(f.name, _help(f.metadata["help"], f.default)) for f in fields(kind)]
            _print(f"Table [{name}] of the recipe", rows)


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    if rows:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in rows:
            table.add_row(Text(name, "bold"), text)
        out.print(Panel(table, title=Text(title), title_align="left", border_style="dim"))


def _panel(parameter: Any) -> str:
    if isinstance(parameter, TyperArgument):
        return _ARGUMENTS
    return getattr(parameter, "rich_help_panel", None) or RARE


def _name(parameter: Any) -> str:
    """Return how a parameter is spelled: ``-o, --output PATH`` or ``--[no-]flip``."""
    if isinstance(parameter, TyperArgument):
        return str(parameter.name)
    if parameter.secondary_opts:
        return parameter.opts[0].replace("--", "--[no-]", 1)
    flags = ", ".join(sorted(parameter.opts, key=lambda flag: flag.startswith("--")))
    return f"{flags} {parameter.metavar or ''}".rstrip()


def _help(text: str | None, default: Any, envvar: str | None = None) -> str:
    """Return a help text with the environment variable and the default."""
    notes = [f"[env: {envvar}]"] if envvar else []
    if isinstance(default, float):
        default = f"{default:.4g}"
    if isinstance(default, tuple):
        default = list(default)
    if not (default is None or default is False or default == ""):
        notes.append(f"[default: {'on' if default is True else default}]")
    return " ".join([text or "", *notes])
