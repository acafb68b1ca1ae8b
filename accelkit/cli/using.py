"""The commands that use and look at models: ``sample``, ``schedules`` and the rest."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from accelkit.cli.options import (
    AsJson,
    DryRun,
    Guidance,
    GuidanceChannels,
    Kernels,
    Model,
    NumHeads,
    Overwrite,
    Recipe,
    Revision,
    Sampler,
    Vae,
    Variant,
    reporter,
    sampling_of,
    source_of,
)
from accelkit.cli.settings import read_recipe, resolve
from accelkit.cli.show import intervals, out, overview, saved, shown, worded
from accelkit.errors import AccelkitError
from accelkit.preset_names import common_presets, families, preset_family, preset_names
from accelkit.presets import published_depth
from accelkit.schedule import Schedule


def sample(
    ctx: typer.Context,
    model: Model = "builtin",
    schedule: Annotated[
        str | None, typer.Option(help="Default: the one the model was tuned for, if any.")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("samples"),
    number: Annotated[int, typer.Option("-n", "--number", help="How many images.")] = 16,
    labels: Annotated[
        str | None, typer.Option(help="Classes to go round, e.g. 3,1,4 or 0-9. Default: all known.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the next has the next.")] = 0,
    sampler: Sampler = "auto",
    steps: Annotated[int, typer.Option(help="Network calls per image.")] = 50,
    guidance: Guidance = 1.0,
    guidance_channels: GuidanceChannels = 0,
    batch_size: Annotated[int, typer.Option(help="Changes the speed, not the images.")] = 64,
    kernels: Kernels = "auto",
    compile: Annotated[
        str | None,
        typer.Option(help="graphs: a CUDA graph for each depth; or a backend of torch.compile."),
    ] = None,
    recipe: Recipe = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    revision: Revision = None,
    variant: Variant = None,
    vae: Vae = None,
    num_heads: NumHeads = 0,
) -> None:
    """Sample images: one PNG each and a grid of all.

    Examples:

      accelkit sample -n 16 -o samples

      accelkit sample --model runs/finetune-D4 --labels 3,1,4 --guidance 2 --sampler dpm --steps 20
    """
    settings = resolve(ctx, read_recipe(recipe) if recipe else {})
    if shown(settings):
        return
    from accelkit.jobs.sample import sample as job

    with reporter() as report:
        files = job(
            source_of(settings),
            settings["schedule"],
            settings["labels"],
            settings["number"],
            settings["seed"],
            settings["batch_size"],
            sampling_of({**settings, "sampling_steps": settings["steps"]}),
            settings["output"],
            settings["overwrite"],
            settings["kernels"],
            settings["compile"],
            report,
        )
    if settings["as_json"]:
        typer.echo(json.dumps({"files": [str(f) for f in files]}))
    else:
        out.print(f"{len(files)} images and grid.png in {settings['output']}", highlight=False)


def schedules(
    name: Annotated[str | None, typer.Argument(help="A schedule; none lists the presets.")] = None,
    depth: Annotated[
        int | None, typer.Option(help="Blocks of the model that count. Default: as published.")
    ] = None,
    family: Annotated[str, typer.Option(help="Whose presets.")] = "dit",
    sampler: Annotated[
        str | None,
        typer.Option(help="Cost under a sampler of its process: ddpm, ddim, dpm or dpm-fast."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show schedules: blocks run by noise level, mean depth and ideal saving.

    Examples:

      accelkit schedules

      accelkit schedules D4 --sampler ddim --steps 50
    """
    if preset_family(family) != family:
        raise AccelkitError(
            f"no presets are named for the family {family!r}; those with presets of their own are "
            f"{', '.join(families())}, all others use the first one's"
        )
    depth = published_depth(family) if depth is None else depth
    if name:
        chosen = [Schedule.parse(name, depth, family)]
    else:
        chosen = [Schedule.parse(n, depth, family) for n in preset_names(family)]
        for common in common_presets():
            with suppress(AccelkitError):  # it needs more blocks
                chosen.append(Schedule.parse(common, depth, family))
    levels = _visited_levels(sampler, steps) if sampler else None
    if as_json:
        rows = [
            {
                **s.to_dict(),
                "mean_depth": s.mean_depth(levels),
                "ideal_saving": s.ideal_saving(levels),
            }
            for s in chosen
        ]
        typer.echo(json.dumps(rows[0] if name else rows, indent=2))
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


def convert(
    source: Annotated[
        Path, typer.Argument(help="An original-layout file or a diffusers directory.")
    ],
    target: Annotated[
        Path, typer.Argument(help="A directory, or a .pt, .pth or .safetensors file.")
    ],
    num_heads: NumHeads = 0,
    allow_inexact: Annotated[
        bool, typer.Option(help="Convert though the original code computes slightly else.")
    ] = False,
    overwrite: Overwrite = False,
    variant: Variant = None,
) -> None:
    """Convert a DiT's or U-ViT's checkpoint: original layout to a diffusers directory, or back.

    Examples:

      accelkit convert DiT-XL-2-256x256.pt dit-xl-2-256

      accelkit convert dit-xl-2-256 DiT-XL-2.safetensors
    """
    from accelkit.jobs.convert import convert as job

    made = job(source, target, num_heads or None, allow_inexact, overwrite, variant)
    out.print(f"wrote {made}", highlight=False)


def inspect(
    model: Model = "builtin",
    schedule: Annotated[str | None, typer.Option(help="Show its cost on this model.")] = None,
    revision: Revision = None,
    variant: Variant = None,
    num_heads: NumHeads = 0,
    as_json: AsJson = False,
) -> None:
    """Show what accelkit sees in a model: family, blocks, parameters, cost per depth.

    Example:

      accelkit inspect --model facebook/DiT-XL-2-256 --schedule D4
    """
    from accelkit.jobs.inspect import inspect as job

    seen = job(model, revision, schedule, num_heads or None, variant)
    if as_json:
        typer.echo(json.dumps(seen, indent=2))
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
    """The noise levels a sampler visits on the linear-beta process of DiT."""
    from accelkit.noise.axis import NoiseAxis, reference_process
    from accelkit.sample.samplers import make_sampler

    made = make_sampler(sampler, reference_process(), steps)
    return NoiseAxis.of(made).levels(made.timesteps)
