"""The commands that compare: ``bench``, and ``report`` on what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from accelkit.cli.options import (
    AsJson,
    Baselines,
    ClassMap,
    Data,
    DryRun,
    Guidance,
    GuidanceChannels,
    Kernels,
    Model,
    NumHeads,
    Overwrite,
    Recipe,
    Revision,
    SkipBad,
    Vae,
    Variant,
    check_output,
    fill_in_data,
    listed,
    made_of_builtin,
    reporter,
    source_of,
    tuned_weights,
)
from accelkit.cli.settings import read_recipe, resolve
from accelkit.cli.show import out, print_results, shown
from accelkit.errors import AccelkitError


def bench(
    ctx: typer.Context,
    model: Model = "builtin",
    schedules: Annotated[
        str,
        typer.Option(
            help="Presets or files between commas; with a literal among them, semicolons."
        ),
    ] = "full,D1,D3,D4,D6",
    samplers: Annotated[
        str,
        typer.Option(
            help="Each with its number of network calls: ddpm:250, ddim:50, dpm:20 (DPM-Solver++), "
            "dpm-fast:20 (single-step), em:1000 (continuous VP SDE), flow:28 (flow matching); "
            "auto: the deterministic one of the model's process."
        ),
    ] = "auto:50,auto:10",
    baselines: Baselines = "tome:0.3,steps",
    tuned: Annotated[
        str,
        typer.Option(help="Fine-tuned models by schedule: D4=runs/d4,D6=runs/d6."),
    ] = "",
    data: Data = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="What images are judged by: digits, torch-fidelity, or a TorchScript file such as "
            "inception-2015-12-05.pt. Default: digits for the digits."
        ),
    ] = None,
    features_sha256: Annotated[
        str | None, typer.Option(help="Refuse a feature extractor with another SHA-256.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Images or .npz statistics to compare with. Default: the data."),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("runs/bench"),
    num_images: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--num-images",
            help="Images per row, for the quality. Default: 500 for the built-in model, else 5000.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Classes to go round, e.g. 3,1,4 or 0-9."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Of these; it changes no figure. Default: 250 for the built-in model, else 32."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the next has the next.")] = 0,
    rounds: Annotated[int, typer.Option(help="Timed calls per row and sampler.")] = 7,
    timing_batch_size: Annotated[int, typer.Option(help="Images of a timed call.")] = 32,
    throughput: Annotated[
        str, typer.Option(help="Batch sizes to measure images per second at; empty for none.")
    ] = "1,8",
    guidance: Guidance = 1.0,
    guidance_channels: GuidanceChannels = 0,
    kernels: Kernels = "auto",
    recipe: Recipe = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    revision: Revision = None,
    variant: Variant = None,
    vae: Vae = None,
    num_heads: NumHeads = 0,
    class_map: ClassMap = None,
    skip_bad: SkipBad = False,
) -> None:
    """Compare schedules with every alternative, in time and quality, and write a report.

    The same command again goes on where it was interrupted, and measures nothing twice.

    Examples:

      accelkit bench --model builtin

      accelkit bench --schedules D4,D4+tome:0.3 --baselines tome:0.3:B4,pab,D4+pab,compile,steps

      accelkit bench --model runs/finetune-D4 --schedules D4 --samplers ddpm:250,ddim:50

      accelerate launch -m accelkit bench --model facebook/DiT-XL-2-256 --data imagenet/train …
    """
    settings = resolve(ctx, read_recipe(recipe) if recipe else {})
    fill_in_data(settings)
    small = made_of_builtin(settings)
    defaults = {"num_images": 500 if small else 5000, "batch_size": 250 if small else 32}
    settings |= {name: value for name, value in defaults.items() if settings[name] is None}
    from accelkit.bench.protocol import Protocol

    plan = Protocol(
        methods=";".join([*listed(settings["schedules"]), *listed(settings["baselines"])]),
        samplers=tuple(listed(settings["samplers"])),
        images=settings["num_images"],
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        labels=settings["labels"],
        guidance=settings["guidance"],
        guidance_channels=settings["guidance_channels"] or None,
        kernels=settings["kernels"],
        rounds=settings["rounds"],
        timing_batch_size=settings["timing_batch_size"],
        throughput=_sizes(settings["throughput"]),
        features=settings["features"],
        features_sha256=settings["features_sha256"],
        reference=settings["reference"],
    )
    weights = tuned_weights(settings["tuned"])
    check_output(settings["output"])
    if shown(settings):
        return
    from accelkit.jobs.bench import bench as job

    with reporter() as report_to:
        results = job(
            source_of(settings),
            plan,
            settings["output"],
            report_to,
            tuned=weights,
            overwrite=settings["overwrite"],
        )
    if results:
        print_results(results, settings["output"], settings["as_json"])


def report(
    directory: Annotated[Path, typer.Argument(help="Where accelkit bench left results.json.")],
) -> None:
    """Write report.html, report.md and the plots anew from results.json.

    Example:

      accelkit report runs/bench
    """
    from accelkit.bench.report.report import write_report
    from accelkit.bench.results import RESULTS, read_results

    for path in write_report(directory, read_results(directory / RESULTS)):
        out.print(str(path), highlight=False, soft_wrap=True)


def _sizes(text: str) -> tuple[int, ...]:
    parts = listed(text)
    if not all(part.isdecimal() and len(part) < 10 for part in parts):  # int() has a limit
        raise AccelkitError(f"--throughput takes batch sizes such as 1,8,64, got {text!r}")
    return tuple(int(part) for part in parts)
