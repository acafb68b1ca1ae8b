"""The commands that compare: ``bench``, and ``report`` on its results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from accelkit.bench.protocol import Protocol, listed
from accelkit.cli.command import Call, command
from accelkit.cli.options import Options
from accelkit.cli.progress import TerminalReporter
from accelkit.cli.show import out, print_results
from accelkit.cli.training import Baselines
from accelkit.errors import AccelkitError
from accelkit.fields import ESSENTIAL, MODEL
from accelkit.jobs.defaults import bench_defaults, data_of, with_data
from accelkit.jobs.settings import Run, Source
from accelkit.sample.sampling import Sampling

Tuned = Annotated[
    str,
    typer.Option(
        help="Fine-tuned models by schedule: D4=runs/d4,D6=runs/d6", rich_help_panel=MODEL
    ),
]


def _suited(source: Source, **_: Any) -> dict[str, Any]:
    """Return settings that suit the model."""
    return {"protocol": bench_defaults(source.model), **data_of(source.model)}


@command(_suited)
def bench(
    call: Call,
    source: Annotated[Source, Options(without=("flip",))] = Source(data=""),
    schedules: Annotated[
        str,
        typer.Option(
            help="Schedules: presets or files, commas between them; semicolons if a literal "
            "depth@edge,… is among them",
            rich_help_panel=ESSENTIAL,
        ),
    ] = "full,D1,D3,D4,D6",
    baselines: Baselines = "tome:0.3,steps",
    tuned: Tuned = "",
    run: Annotated[Run, Options(only=("output", "overwrite"))] = Run(Path("runs/bench")),
    protocol: Protocol = Protocol("full"),
    sampling: Annotated[Sampling, Options(only=("guidance", "guidance_channels"))] = Sampling(),
) -> None:
    """Compare schedules with every alternative, in time and quality, and write a report.

    The same command again continues where it was interrupted, and measures nothing twice.
    The built-in model is measured on 500 images, in batches of 250, unless these are given.

    Examples:

      accelkit bench --model builtin

      accelkit bench --schedules D4,D4+tome:0.3 --baselines tome:0.3:B4,pab,D4+pab,compile,steps

      accelkit bench --model runs/finetune-D4 --schedules D4 --samplers ddpm:250,ddim:50

      accelerate launch -m accelkit bench --model facebook/DiT-XL-2-256 --data imagenet/train …
    """
    source = with_data(source)
    protocol = replace(
        protocol,
        methods=";".join([*listed(schedules), *listed(baselines)]),
        guidance=sampling.guidance,
        guidance_channels=sampling.guidance_channels,
    )
    weights = tuned_weights(tuned)
    if call.is_dry_run():
        return
    from accelkit.jobs.bench import bench as job

    with TerminalReporter() as report_to:
        results = job(
            source, protocol, run.output, report_to, tuned=weights, overwrite=run.overwrite
        )
    if results:
        print_results(results, run.output, call.json)


def report(
    directory: Annotated[
        Path, typer.Argument(help="Directory with the results.json of accelkit bench")
    ],
) -> None:
    """Write report.html, report.md and the plots again, from results.json.

    Example:

      accelkit report runs/bench
    """
    from accelkit.bench.report.report import write_report
    from accelkit.bench.results import RESULTS, read_results

    for path in write_report(directory, read_results(directory / RESULTS)):
        out.print(str(path), highlight=False, soft_wrap=True)


def tuned_weights(text: str) -> dict[str, str]:
    """Return the directories of artifacts by the schedules that they are tuned for."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(";" if ";" in text else ",")):
        schedule, equals, folder = part.rpartition("=")
        if not equals or not schedule or not folder:
            raise AccelkitError(
                f"--tuned takes schedules with their models, such as D4=runs/finetune-D4, "
                f"got {part!r}"
            )
        found[schedule.strip()] = folder.strip()
    return found
