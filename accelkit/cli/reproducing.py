"""The command that repeats published results: ``reproduce``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from accelkit.cli.options import (
    AsJson,
    ClassMap,
    Kernels,
    NumHeads,
    Revision,
    SkipBad,
    Vae,
    check_output,
    reporter,
    tuned_weights,
)
from accelkit.cli.show import out, print_results, worded
from accelkit.jobs.published import Publication, check_scale, names, publication


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="Such as ase-table3; none lists all there are.")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="full: as published; digits: in miniature, on the built-in data.")
    ] = "full",
    model: Annotated[
        str | None, typer.Option(help="The published model: a directory, original file or hub id.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The published data: a folder of images or a zip.")
    ] = None,
    tuned: Annotated[
        str, typer.Option(help="Weights there are: D4=runs/d4,D6=runs/d6. The rest is trained.")
    ] = "",
    features: Annotated[
        str | None, typer.Option(help="What images are judged by, as accelkit bench has it.")
    ] = None,
    features_sha256: Annotated[
        str | None, typer.Option(help="Refuse a feature extractor with another SHA-256.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Images or .npz statistics to compare with.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of trainings and images; another one is another repetition.")
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Default: runs/reproduce/NAME-SCALE, -seedN behind it if not 0."
        ),
    ] = None,
    kernels: Kernels = "auto",
    dry_run: Annotated[
        bool, typer.Option(help="Show settings, published figures and what to mind; run nothing.")
    ] = False,
    as_json: AsJson = False,
    revision: Revision = None,
    vae: Vae = None,
    num_heads: NumHeads = 0,
    class_map: ClassMap = None,
    skip_bad: SkipBad = False,
) -> None:
    """Repeat a published table: train what it needs, then compare, its figures beside ours.

    The same command again goes on where it was interrupted.

    Examples:

      accelkit reproduce

      accelkit reproduce ase-table3 --scale digits

      accelkit reproduce ase-table3 --model DiT-XL-2-256x256.pt --data imagenet/train

      accelkit reproduce dvd-table-a2
    """
    if name is None:
        _list(as_json)
        return
    table = publication(name)
    brought = tuned_weights(tuned)
    from accelkit.sample.generate import check_seed

    check_seed(seed)
    check_scale(scale)
    if table.full is None or dry_run:
        _show(table, scale, as_json)
        return
    from accelkit.jobs.common import Source
    from accelkit.jobs.reproduce import Given
    from accelkit.jobs.reproduce import reproduce as job

    folder = f"{name}-{scale}" + (f"-seed{seed}" if seed else "")
    place = output or Path("runs") / "reproduce" / folder
    check_output(place)
    with reporter() as report:
        results = job(
            table,
            scale,
            Source(
                model or "",
                data or "",
                revision,
                vae,
                num_heads or None,
                skip_bad,
                class_map=class_map,
            ),
            Given(brought, kernels, features, features_sha256, reference, seed),
            place,
            report,
        )
    found = {place / variant: part for variant, part in results.items() if part}
    if as_json:
        parts = [{"output": str(where), "rows": part["rows"]} for where, part in found.items()]
        typer.echo(json.dumps(parts, indent=2))
        return
    for where, part in found.items():
        print_results(part, where, as_json=False)


def _list(as_json: bool) -> None:
    found = [publication(name) for name in names()]
    if as_json:
        keys = ("name", "source", "title", "needs")
        rows = [{key: getattr(p, key) for key in keys} for p in found]
        typer.echo(json.dumps(rows, indent=2))
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
        typer.echo(json.dumps(plain, indent=2))
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
