"""The command line: parse, call, print. Everything heavy is imported by the command that runs."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from accelkit import AccelkitError, __version__
from accelkit.cli.benching import bench, report
from accelkit.cli.reproducing import reproduce
from accelkit.cli.training import finetune, train
from accelkit.cli.using import convert, inspect, sample, schedules
from accelkit.errors import AccelkitWarning, Stopped
from accelkit.loading import quiet

EXAMPLES = """
Make pretrained diffusion models faster: compute follows the noise level.

Examples:

  accelkit finetune --schedule D4

  accelkit finetune --schedule D4 --model facebook/DiT-XL-2-256 --data imagenet/train -o runs/d4

  accelkit sample --model runs/finetune-D4 -n 16 -o samples

  accelkit bench --schedules D1,D3,D4,D6 -o runs/bench

  accelkit reproduce ase-table3 --scale digits

  accelkit schedules D4 --sampler ddim --steps 50

  accelkit inspect --model runs/finetune-D4
"""

app = typer.Typer(
    help=EXAMPLES,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False

for command in (finetune, train, sample, bench, report, reproduce, schedules, convert, inspect):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _globals(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        typer.echo(f"accelkit {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Run the command line: errors are one line and exit status 2, ``--debug`` shows where."""
    quiet()
    _show_warnings_as_lines()
    try:
        sys.exit(app(standalone_mode=False))
    except Stopped as stopped:
        typer.echo(f"accelkit: {stopped}", err=True)
        sys.exit(128 + stopped.signum)
    except (AccelkitError, TypeError, OSError) as error:
        if _debug:
            traceback.print_exc()
        elif not isinstance(error, AccelkitError):
            typer.echo(f"accelkit: {type(error).__name__}: {_one_line(error)}", err=True)
        else:
            typer.echo(f"accelkit: {_one_line(error)}", err=True)
        sys.exit(2)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        # the parser's own, which it would draw in a box
        typer.echo(f"accelkit: {' '.join(message().split())} See --help.", err=True)
        sys.exit(2)
    finally:
        _leave_processes()


def _leave_processes() -> None:
    """Part from the other processes of the run, if it had any."""
    if (accelerate := sys.modules.get("accelerate")) and accelerate.PartialState._shared_state:
        accelerate.PartialState().destroy_process_group()


def _show_warnings_as_lines() -> None:
    """Print accelkit's warnings as its errors are: where in the code they arose tells nothing."""
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, AccelkitWarning):
            typer.echo(f"accelkit: warning: {_one_line(message)}", err=True)
        else:
            shown(message, category, *rest, **more)

    warnings.showwarning = show


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
