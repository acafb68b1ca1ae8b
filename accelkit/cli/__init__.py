"""The command line: parse, call, print. Everything heavy is imported by the command that runs."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from accelkit.cli.benching import bench, report
from accelkit.cli.help import Command
from accelkit.cli.reproducing import reproduce
from accelkit.cli.terminal import quiet, say, show_anywhere, show_warnings_as_lines, worded
from accelkit.cli.training import finetune, train
from accelkit.cli.using import convert, inspect, sample, schedules
from accelkit.errors import Stopped
from accelkit.version import __version__

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

_INTERRUPTED = 130

app = typer.Typer(
    help=EXAMPLES,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False

for command in (finetune, train, sample, bench, report, reproduce, schedules, convert, inspect):
    app.command(cls=Command)(command)


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
    """Run the command line: errors are one line and exit status 2, ``--debug`` shows where.

    A fault of accelkit's own is one line as well, and exit status 1.
    """
    quiet()
    show_anywhere()
    show_warnings_as_lines()
    try:
        status = app(standalone_mode=False)
        if status == _INTERRUPTED:
            say("interrupted")
        sys.exit(status)
    except Stopped as stopped:
        say(stopped)
        sys.exit(128 + stopped.signum)
    except typer.Abort:  # older versions of the parser raise it on Ctrl-C
        say("interrupted")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        message = worded(error)
        if _debug and not hasattr(error, "format_message"):
            traceback.print_exc()
        elif message is not None:
            say(message)
        else:
            say(
                f"a fault of accelkit's own, {type(error).__name__}: {error}; please report it "
                "with what the same command prints after accelkit --debug"
            )
        sys.exit(1 if message is None else 2)
    finally:
        _leave_processes()


def _leave_processes() -> None:
    """End the connection to the other processes of a distributed run."""
    if (accelerate := sys.modules.get("accelerate")) and accelerate.PartialState._shared_state:
        accelerate.PartialState().destroy_process_group()
