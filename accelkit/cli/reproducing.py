"""The command that repeats published results: ``reproduce``."""

from __future__ import annotations

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from accelkit.bench.protocol import Protocol
from accelkit.cli.benching import Tuned, tuned_weights
from accelkit.cli.command import AsJson, command
from accelkit.cli.options import Options
from accelkit.cli.progress import TerminalReporter
from accelkit.cli.show import out, print_results, worded
from accelkit.fields import ESSENTIAL, OUTPUT
from accelkit.jobs.published import Publication, check_scale, names, publication
from accelkit.jobs.settings import Source, check_output


@command()
def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="Publication, such as ase-table3; a list by default")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="Scale: full, as published; or digits, a miniature on the built-in data",
            rich_help_panel=ESSENTIAL,
        ),
    ] = "full",
    source: Annotated[Source, Options(without=("flip", "variant"))] = Source(model="", data=""),
    tuned: Tuned = "",
    protocol: Annotated[
        Protocol, Options(only=("kernels", "features", "features_sha256", "reference", "seed"))
    ] = Protocol("full"),
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Output directory; by default runs/reproduce/NAME-SCALE, or NAME-SCALE-seedN",
            rich_help_panel=ESSENTIAL,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Settings, published figures and notes printed, nothing run",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    json: AsJson = False,
) -> None:
    """Repeat a published table: train what it needs, then compare; show both figures.

    The same command again continues where it was interrupted.

    Examples:

      accelkit reproduce

      accelkit reproduce ase-table3 --scale digits

      accelkit reproduce ase-table3 --model DiT-XL-2-256x256.pt --data imagenet/train

      accelkit reproduce dvd-table-a2
    """
    if name is None:
        _list(json)
        return
    table = publication(name)
    brought = tuned_weights(tuned)
    from accelkit.sample.generate import check_seed

    check_seed(protocol.seed)
    check_scale(scale)
    if table.full is None or dry_run:
        _show(table, scale, json)
        return
    from accelkit.jobs.reproduce import Given
    from accelkit.jobs.reproduce import reproduce as job

    folder = f"{name}-{scale}" + (f"-seed{protocol.seed}" if protocol.seed else "")
    place = output or Path("runs") / "reproduce" / folder
    check_output(place)
    given = Given(
        brought,
        protocol.kernels,
        protocol.features,
        protocol.features_sha256,
        protocol.reference,
        protocol.seed,
    )
    with TerminalReporter() as report:
        results = job(table, scale, source, given, place, report)
    found = {place / variant: part for variant, part in results.items() if part}
    if json:
        parts = [{"output": str(where), "rows": part["rows"]} for where, part in found.items()]
        typer.echo(dumps(parts, indent=2))
        return
    for where, part in found.items():
        print_results(part, where, as_json=False)


def _list(as_json: bool) -> None:
    found = [publication(name) for name in names()]
    if as_json:
        keys = ("name", "source", "title", "needs")
        rows = [{key: getattr(p, key) for key in keys} for p in found]
        typer.echo(dumps(rows, indent=2))
        return
    table = Table("name", "miniature", title="accelkit reproduce NAME", title_justify="left")
    for heading in ("compares", "needs"):
        table.add_column(heading)
    for p in found:
        table.add_row(p.name, "yes" if p.digits else "–", p.title, p.needs)
    out.print(table)
    for work in dict.fromkeys(f"{p.paper}: {p.work}" for p in found):
        out.print(work, highlight=False, markup=False)


def _show(found: Publication, scale: str, as_json: bool) -> None:
    """Print what a reproduction would do, the published figures, and the counted ones."""
    from accelkit.jobs.published_costs import counted

    experiment = found.experiment(scale) if found.full else None
    costs = counted(found)
    if as_json:
        plain = {"source": found.source, **asdict(found), "scale": scale, "counted": costs}
        typer.echo(dumps(plain, indent=2))
        return
    for line in (f"{found.title} ({found.source})", found.work, f"needs {found.needs}"):
        out.print(line, highlight=False, markup=False)
    for note in found.notes:
        out.print(f"- {note}", highlight=False, markup=False)
    if experiment is not None:
        settings = Table("setting", "value", title=f"{scale} scale", title_justify="left")
        for key, value in asdict(experiment).items():
            if value:
                settings.add_row(key.replace("_", " "), _worded(value))
        out.print(settings)
    _rows("published", [dict(figure) for figure in found.figures])
    if found.missing:
        out.print(f"not known to us: {found.missing}", highlight=False, markup=False)
    _rows("published, and counted here", costs)


def _worded(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_worded(part)}" for key, part in value.items())
    return ", ".join(value) if isinstance(value, tuple) else worded(value)


def _rows(title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{v:.5g}" if isinstance(v, float) else str(v) for v in values))
    out.print(table)
