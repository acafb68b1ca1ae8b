"""The commands that use and show models: ``sample``, ``schedules``, ``convert``, ``inspect``."""

from __future__ import annotations

from contextlib import suppress
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from accelkit.cli.command import AsJson, Call, command
from accelkit.cli.options import MODEL_ONLY, Kernels, Labels, Options, Overwrite, Seed
from accelkit.cli.progress import TerminalReporter
from accelkit.cli.show import intervals, out, overview, saved, worded
from accelkit.errors import AccelkitError
from accelkit.fields import ESSENTIAL, EVALUATION
from accelkit.jobs.settings import Source
from accelkit.preset_names import (
    SEQUENTIAL,
    common_presets,
    families,
    preset_family,
    preset_names,
)
from accelkit.presets import published_depth
from accelkit.sample.sampling import Sampling
from accelkit.schedule import Schedule


@command()
def sample(
    call: Call,
    source: Annotated[Source, Options(only=MODEL_ONLY)] = Source(),
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Schedule; by default that of a fine-tuned model", rich_help_panel=ESSENTIAL
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Output directory", rich_help_panel=ESSENTIAL),
    ] = Path("samples"),
    overwrite: Overwrite = False,
    number: Annotated[
        int,
        typer.Option("-n", "--number", help="Number of images", rich_help_panel=ESSENTIAL),
    ] = 16,
    labels: Labels = None,
    seed: Seed = 0,
    sampling: Sampling = Sampling(),
    batch_size: Annotated[
        int,
        typer.Option(
            help="Images generated at once, without effect on the images",
            rich_help_panel=EVALUATION,
        ),
    ] = 64,
    kernels: Kernels = "auto",
    compile: Annotated[
        str | None,
        typer.Option(
            help="Compilation: graphs for a CUDA graph of each depth, or a backend of torch.compile"
        ),
    ] = None,
) -> None:
    """Sample images: one PNG each and a grid of all.

    Examples:

      accelkit sample -n 16 -o samples

      accelkit sample --model runs/finetune-D4 --labels 3,1,4 --guidance 2 --sampler dpm --steps 20
    """
    if call.is_dry_run():
        return
    from accelkit.jobs.sample import sample as job

    with TerminalReporter() as report:
        files = job(
            source,
            schedule,
            labels,
            number,
            seed,
            batch_size,
            sampling,
            output,
            overwrite,
            kernels,
            compile,
            report,
        )
    if call.json:
        typer.echo(dumps({"files": [str(f) for f in files]}))
    else:
        out.print(f"{len(files)} images and grid.png in {output}", highlight=False)


@command()
def schedules(
    name: Annotated[str | None, typer.Argument(help="Schedule; all presets by default")] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            help="Counted blocks of the model; by default as published", rich_help_panel=ESSENTIAL
        ),
    ] = None,
    family: Annotated[
        str, typer.Option(help="Family of the model", rich_help_panel=ESSENTIAL)
    ] = "dit",
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Sampler that the cost is averaged over: ddpm, ddim, dpm or dpm-fast",
            rich_help_panel=ESSENTIAL,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Network calls of the sampler", rich_help_panel=ESSENTIAL)
    ] = 50,
    json: AsJson = False,
) -> None:
    """Show schedules: blocks run by noise level, mean depth and ideal saving.

    Examples:

      accelkit schedules

      accelkit schedules D4 --sampler ddim --steps 50
    """
    if preset_family(family) != family:
        raise AccelkitError(
            f"the family {family!r} has no presets of its own; leave --family out for those of "
            f"{SEQUENTIAL}, or give one of {', '.join(families())}"
        )
    depth = published_depth(family) if depth is None else depth
    if name:
        chosen = [Schedule.parse(name, depth, family)]
    else:
        chosen = [Schedule.parse(n, depth, family) for n in preset_names(family)]
        for common in common_presets():
            with suppress(AccelkitError):  # the preset may need more blocks
                chosen.append(Schedule.parse(common, depth, family))
    levels = _visited_levels(sampler, steps) if sampler else None
    if json:
        rows = [
            {
                **s.to_dict(),
                "mean_depth": s.mean_depth(levels),
                "ideal_saving": s.ideal_saving(levels),
            }
            for s in chosen
        ]
        typer.echo(dumps(rows[0] if name else rows, indent=2))
        return
    where = f"{sampler}, {steps} steps" if sampler else "all noise levels alike"
    if name:
        out.print(intervals(chosen[0]))
    else:
        out.print(overview(chosen, levels, where))
        return
    saving = f"{chosen[0].ideal_saving(levels):.2%}"
    mean = f"{chosen[0].mean_depth(levels):.2f} of {depth}"
    out.print(f"{where}: mean depth {mean}, {saved(chosen[0])} {saving}", highlight=False)


@command()
def convert(
    source: Annotated[Path, typer.Argument(help="Original-layout file or diffusers directory")],
    target: Annotated[Path, typer.Argument(help="Directory, or a .pt, .pth or .safetensors file")],
    weights: Annotated[Source, Options(only=("num_heads", "variant"))] = Source(),
    allow_inexact: Annotated[
        bool,
        typer.Option(help="Conversion even if the original code computes slightly differently"),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a DiT's or U-ViT's checkpoint: original layout to a diffusers directory, or back.

    Examples:

      accelkit convert DiT-XL-2-256x256.pt dit-xl-2-256

      accelkit convert dit-xl-2-256 DiT-XL-2.safetensors
    """
    from accelkit.jobs.convert import convert as job

    made = job(source, target, weights.num_heads, allow_inexact, overwrite, weights.variant)
    out.print(f"wrote {made}", highlight=False)


@command()
def inspect(
    source: Annotated[
        Source, Options(only=("model", "revision", "variant", "num_heads"))
    ] = Source(),
    schedule: Annotated[
        str | None,
        typer.Option(help="Schedule whose cost is shown", rich_help_panel=ESSENTIAL),
    ] = None,
    json: AsJson = False,
) -> None:
    """Show what accelkit sees in a model: family, blocks, parameters, cost per depth.

    Example:

      accelkit inspect --model facebook/DiT-XL-2-256 --schedule D4
    """
    from accelkit.jobs.inspect import inspect as job

    seen = job(source.model, source.revision, schedule, source.num_heads, source.variant)
    if json:
        typer.echo(dumps(seen, indent=2))
        return
    table = Table(show_header=False)
    for key, value in seen.items():
        if key != "gmacs_by_depth":
            table.add_row(key.replace("_", " "), worded(value))
    out.print(table)
    if not (costs := seen.get("gmacs_by_depth")):
        return
    least, most = seen["least_depth"], seen["blocks"]
    cost = Table("depth", "GMACs per call", "of full")
    for d in sorted({least, *(most * i // 4 for i in range(1, 5))}):
        if d >= least:
            spent = costs[d - least]
            cost.add_row(str(d), f"{spent:.4g}", f"{spent / costs[-1]:.1%}")
    out.print(cost)


def _visited_levels(sampler: str, steps: int) -> list[float]:
    """Return the noise levels that a sampler visits on the linear-beta process of DiT."""
    from accelkit.noise.axis import NoiseAxis, reference_process
    from accelkit.sample.samplers import make_sampler

    made = make_sampler(sampler, reference_process(), steps)
    return NoiseAxis.of(made).levels(made.timesteps)
