"""The command line: parse, call, print. Everything heavy is imported by the command that runs."""

from __future__ import annotations

import json
import re
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from accelkit import AccelkitError, Schedule, __version__
from accelkit.errors import Stopped
from accelkit.schedule import preset_names
from accelkit.settings import read_recipe, resolve

EXAMPLES = """
Make pretrained diffusion models faster: compute follows the noise level.

Examples:

  accelkit finetune --schedule D4

  accelkit finetune --schedule D4 --model facebook/DiT-XL-2-256 --data imagenet/train -o runs/d4

  accelkit sample --model runs/finetune-D4 -n 16 -o samples

  accelkit bench --schedules D1,D3,D4,D6 -o runs/bench

  accelkit schedules D4 --sampler ddim --steps 50

  accelkit inspect --model runs/finetune-D4
"""

app = typer.Typer(
    help=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
_debug = False

Model = Annotated[
    str, typer.Option(help="builtin, a directory, an original-layout file or a hub id.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Data = Annotated[str, typer.Option(help="digits, a folder of images (by class) or a zip of one.")]
SkipBad = Annotated[bool, typer.Option(help="Go on without images that cannot be read.")]
Recipe = Annotated[Path | None, typer.Option(help="TOML file that sets any of these options.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what an earlier run left there.")]
DryRun = Annotated[bool, typer.Option(help="Print the resolved settings and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Sampler = Annotated[str, typer.Option(help="ddpm, ddim or dpm (DPM-Solver++).")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")]
GuidanceChannels = Annotated[
    int, typer.Option(help="Latent channels that are guided, 0 for all (the original DiT: 3).")
]


@app.callback(invoke_without_command=True)
def _globals(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        typer.echo(f"accelkit {__version__}")
        raise typer.Exit


@app.command()
def finetune(
    ctx: typer.Context,
    schedule: Annotated[str, typer.Option(help="D1…D6, uniform:K, depth@edge,… or a file.")] = "D4",
    model: Model = "builtin",
    data: Data = "digits",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: runs/finetune-SCHEDULE.")
    ] = None,
    recipe: Recipe = None,
    resume: Annotated[str | None, typer.Option(help="'latest': go on with the run there.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    revision: Revision = None,
    skip_bad: SkipBad = False,
    flip: Annotated[bool, typer.Option(help="Train on mirrored images as well.")] = False,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Samples per step, over all processes.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 2e-5,
    lr_schedule: Annotated[str, typer.Option(help="constant or cosine.")] = "constant",
    lr_warmup_steps: Annotated[int, typer.Option()] = 0,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = 1.0,
    ema_decay: Annotated[float, typer.Option(help="Of the EMA teacher.")] = 0.9999,
    label_dropout: Annotated[float, typer.Option(help="Samples trained without label.")] = 0.1,
    loss_weight: Annotated[
        str, typer.Option(help="lambda(t): ones, or ramp (0.1 at the data to 1 at noise).")
    ] = "ones",
    loss_weight_until: Annotated[
        float, typer.Option(help="Share of the run after which lambda is 1.")
    ] = 1 / 3,
    freeze_time_embedder: Annotated[bool, typer.Option(help="Keep it as it is.")] = True,
    gradient_accumulation: Annotated[int, typer.Option(help="Parts of a batch.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Save memory.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    seed: Annotated[int, typer.Option()] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps; 0: only at the end.")] = 100,
    checkpoints_kept: Annotated[int, typer.Option(help="Newest; 0: all.")] = 2,
    preview_every: Annotated[int, typer.Option(help="Steps between preview grids.")] = 0,
    report_to: Annotated[str | None, typer.Option(help="tensorboard, wandb, …")] = None,
    eval_images: Annotated[int, typer.Option(help="Images per row of the final table.")] = 1000,
    eval_batch_size: Annotated[int, typer.Option()] = 250,
    sampler: Sampler = "ddim",
    sampling_steps: Annotated[int, typer.Option(help="Network calls per image.")] = 50,
    guidance: Guidance = 1.0,
    guidance_channels: GuidanceChannels = 0,
) -> None:
    """Adapt a pretrained model to a schedule, save it and measure what it gained and kept.

    Examples:

      accelkit finetune --schedule D4

      accelkit finetune --schedule D4 --model DiT-XL-2-256x256.pt --data imagenet/train -o runs/d4

      accelkit finetune -o runs/d4 --resume latest

      accelerate launch -m accelkit finetune --schedule D4 --mixed-precision bf16 …
    """
    layers = [read_recipe(recipe)] if recipe else []
    if resume:
        layers.append(_stored(ctx, output, layers))
    first = resolve(ctx, *layers)
    if first["model"] == "builtin":
        from accelkit.assets import FINETUNE_RECIPE

        layers.append(read_recipe(FINETUNE_RECIPE))
    settings = resolve(ctx, *layers)
    settings["output"] = settings["output"] or Path("runs") / _slug(
        f"finetune-{settings['schedule']}"
    )
    from accelkit.jobs.common import Evaluation, Run, Source
    from accelkit.train.config import TrainConfig

    config = _train_config(TrainConfig, settings)
    Schedule.parse(settings["schedule"])
    if _shown(settings, dry_run, as_json):
        return
    _prepare_libraries()
    from accelkit.jobs.finetune import finetune as job

    with _reporter() as reporter:
        rows = job(
            _pick(Source, settings),
            settings["schedule"],
            config,
            Evaluation(
                settings["eval_images"], settings["eval_batch_size"], 0, _sampling(settings)
            ),
            _run(Run, settings),
            reporter,
        )
    if rows:
        _print_rows(rows, settings["output"], as_json)


@app.command()
def train(
    ctx: typer.Context,
    recipe: Recipe = None,
    data: Data = "digits",
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("runs/train"),
    schedule: Annotated[str, typer.Option(help="Train with it from the start.")] = "full",
    resume: Annotated[str | None, typer.Option(help="'latest': go on with the run there.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    skip_bad: SkipBad = False,
    flip: Annotated[bool, typer.Option(help="Train on mirrored images as well.")] = False,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 4000,
    batch_size: Annotated[int, typer.Option(help="Samples per step, over all processes.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 1e-3,
    lr_schedule: Annotated[str, typer.Option(help="constant or cosine.")] = "cosine",
    lr_warmup_steps: Annotated[int, typer.Option()] = 200,
    weight_decay: Annotated[float, typer.Option()] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = 1.0,
    ema_decay: Annotated[float, typer.Option(help="Of the EMA teacher.")] = 0.999,
    label_dropout: Annotated[float, typer.Option(help="Samples trained without label.")] = 0.1,
    loss_weight: Annotated[str, typer.Option(help="lambda(t): ones or ramp.")] = "ones",
    loss_weight_until: Annotated[float, typer.Option()] = 1 / 3,
    freeze_time_embedder: Annotated[bool, typer.Option()] = False,
    gradient_accumulation: Annotated[int, typer.Option(help="Parts of a batch.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Save memory.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    seed: Annotated[int, typer.Option()] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Steps; 0: only at the end.")] = 500,
    checkpoints_kept: Annotated[int, typer.Option(help="Newest; 0: all.")] = 2,
    preview_every: Annotated[int, typer.Option(help="Steps between preview grids.")] = 0,
    report_to: Annotated[str | None, typer.Option(help="tensorboard, wandb, …")] = None,
) -> None:
    """Train a small latent DiT from scratch, autoencoder included; a recipe gives its size.

    Example:

      accelkit train --recipe recipes/digits_dit.toml -o runs/digits-dit
    """
    tables = ("model", "autoencoder")
    layer = read_recipe(recipe, tables) if recipe else {}
    sizes = {name: layer.pop(name, {}) for name in tables}
    settings = resolve(ctx, layer)
    from accelkit.jobs.common import Run, Source
    from accelkit.train.config import TrainConfig

    config = _train_config(TrainConfig, settings)
    if _shown({**settings, **sizes}, dry_run, as_json):
        return
    _prepare_libraries()
    from accelkit.jobs.scratch import PIPELINE, ModelConfig, scratch
    from accelkit.train.autoencoder import AutoencoderConfig

    with _reporter() as reporter:
        scratch(
            _pick(Source, settings),
            settings["schedule"],
            _checked(ModelConfig, sizes["model"], "model"),
            _checked(AutoencoderConfig, sizes["autoencoder"], "autoencoder"),
            config,
            _run(Run, settings),
            reporter,
        )
    out.print(f"pipeline at {settings['output'] / PIPELINE}", highlight=False)


@app.command()
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
    sampler: Sampler = "ddim",
    steps: Annotated[int, typer.Option(help="Network calls per image.")] = 50,
    guidance: Guidance = 1.0,
    guidance_channels: GuidanceChannels = 0,
    batch_size: Annotated[int, typer.Option(help="Changes the speed, not the images.")] = 64,
    recipe: Recipe = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    revision: Revision = None,
) -> None:
    """Sample images: one PNG each and a grid of all.

    Examples:

      accelkit sample -n 16 -o samples

      accelkit sample --model runs/finetune-D4 --labels 3,1,4 --guidance 2 --sampler dpm --steps 20
    """
    settings = resolve(ctx, read_recipe(recipe) if recipe else {})
    if _shown(settings, dry_run, as_json):
        return
    _prepare_libraries()
    from accelkit.jobs.sample import sample as job

    with _reporter() as reporter:
        files = job(
            settings["model"],
            settings["revision"],
            settings["schedule"],
            settings["labels"],
            settings["number"],
            settings["seed"],
            settings["batch_size"],
            _sampling({**settings, "sampling_steps": settings["steps"]}),
            settings["output"],
            settings["overwrite"],
            reporter,
        )
    if as_json:
        typer.echo(json.dumps({"files": [str(f) for f in files]}))
    else:
        out.print(f"{len(files)} images and grid.png in {settings['output']}", highlight=False)


@app.command()
def bench(
    ctx: typer.Context,
    model: Model = "builtin",
    schedules: Annotated[
        str, typer.Option(help="Presets or files separated by commas; literals by semicolons.")
    ] = "D1,D3,D4,D6",
    data: Data = "digits",
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("runs/bench"),
    number: Annotated[int, typer.Option("-n", "--number", help="Images per schedule.")] = 1000,
    batch_size: Annotated[int, typer.Option()] = 250,
    seed: Annotated[int, typer.Option(help="Of the first image.")] = 0,
    sampler: Sampler = "ddim",
    steps: Annotated[int, typer.Option(help="Network calls per image.")] = 50,
    guidance: Guidance = 1.0,
    guidance_channels: GuidanceChannels = 0,
    recipe: Recipe = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    revision: Revision = None,
    skip_bad: SkipBad = False,
) -> None:
    """Time schedules against full depth, interleaved in one run, and score their images.

    Examples:

      accelkit bench --schedules D1,D3,D4,D6

      accelkit bench --model runs/finetune-D4 --schedules D4 --sampler ddpm --steps 250
    """
    settings = resolve(ctx, read_recipe(recipe) if recipe else {})
    if _shown(settings, dry_run, as_json):
        return
    _prepare_libraries()
    from accelkit.jobs.common import Evaluation, Source
    from accelkit.jobs.compare import bench as job

    sampling = _sampling({**settings, "sampling_steps": settings["steps"]})
    with _reporter() as reporter:
        rows = job(
            _pick(Source, settings),
            _split(settings["schedules"]),
            Evaluation(settings["number"], settings["batch_size"], settings["seed"], sampling),
            settings["output"],
            settings["overwrite"],
            reporter,
        )
    _print_rows(rows, settings["output"], as_json)


@app.command()
def schedules(
    name: Annotated[str | None, typer.Argument(help="A schedule; none lists the presets.")] = None,
    depth: Annotated[int, typer.Option(help="Blocks of the model.")] = 28,
    family: Annotated[str, typer.Option(help="Whose presets.")] = "dit",
    sampler: Annotated[
        str | None, typer.Option(help="Cost under a sampler: ddpm, ddim or dpm.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show schedules: blocks run by noise level, mean depth and ideal saving.

    Examples:

      accelkit schedules

      accelkit schedules D4 --sampler ddim --steps 50
    """
    chosen = [Schedule.parse(n, depth, family) for n in ([name] if name else preset_names(family))]
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
        out.print(_intervals(chosen[0]))
    else:
        out.print(_overview(chosen, levels, where))
        return
    saving = f"{chosen[0].ideal_saving(levels):.2%}"
    mean = f"{chosen[0].mean_depth(levels):.2f} of {depth}"
    out.print(f"{where}: mean depth {mean}, ideal saving {saving}", highlight=False)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An original-layout file or a diffusers DiT.")],
    target: Annotated[Path, typer.Argument(help="A directory, or a .pt or .safetensors file.")],
    num_heads: Annotated[int, typer.Option(help="Attention heads, for unpublished sizes.")] = 0,
    allow_inexact: Annotated[
        bool, typer.Option(help="Convert though the original code computes slightly else.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Convert a DiT checkpoint: original layout to a diffusers directory, or back.

    Examples:

      accelkit convert DiT-XL-2-256x256.pt dit-xl-2-256

      accelkit convert dit-xl-2-256 DiT-XL-2.safetensors
    """
    _prepare_libraries()
    from accelkit.jobs.convert import convert as job

    made = job(source, target, num_heads or None, allow_inexact, overwrite)
    out.print(f"wrote {made}", highlight=False)


@app.command()
def inspect(
    model: Model = "builtin",
    schedule: Annotated[str | None, typer.Option(help="Show its cost on this model.")] = None,
    revision: Revision = None,
    num_heads: Annotated[int, typer.Option(help="Attention heads, for unpublished sizes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show what accelkit sees in a model: family, blocks, parameters, cost per depth.

    Example:

      accelkit inspect --model facebook/DiT-XL-2-256 --schedule D4
    """
    _prepare_libraries()
    from accelkit.jobs.inspect import inspect as job

    seen = job(model, revision, schedule, num_heads or None)
    if as_json:
        typer.echo(json.dumps(seen, indent=2))
        return
    table = Table(show_header=False)
    for key, value in seen.items():
        if key != "gmacs_by_depth":
            table.add_row(key.replace("_", " "), _worded(value))
    out.print(table)
    costs = seen["gmacs_by_depth"]
    depths = sorted({1, *(len(costs) * i // 4 for i in range(1, 5))} - {0})
    cost = Table("depth", "GMACs per call", "of full")
    for d in depths:
        cost.add_row(str(d), f"{costs[d - 1]:.4g}", f"{costs[d - 1] / costs[-1]:.1%}")
    out.print(cost)


def main() -> None:
    """Run the command line: errors are one line and exit status 2, ``--debug`` shows where."""
    try:
        app()
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _reporter() -> Any:
    from accelkit.progress import TerminalReporter

    return TerminalReporter()


def _prepare_libraries() -> None:
    from accelkit.loading import quiet

    quiet()


def _pick(kind: Any, settings: dict[str, Any]) -> Any:
    """Build a settings class from the settings of the same names."""
    return kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})


def _train_config(kind: Any, settings: dict[str, Any]) -> Any:
    return _pick(kind, settings)


def _run(kind: Any, settings: dict[str, Any]) -> Any:
    if settings["resume"] not in (None, "latest"):
        raise AccelkitError(f"--resume takes 'latest', got {settings['resume']!r}")
    return kind(
        output=settings["output"],
        resume=settings["resume"] is not None,
        overwrite=settings["overwrite"],
        checkpoint_every=settings["checkpoint_every"],
        keep=settings["checkpoints_kept"],
        preview_every=settings["preview_every"],
        report_to=settings["report_to"],
    )


def _checked(kind: Any, values: dict[str, Any], table: str) -> Any:
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise AccelkitError(f"unknown settings in [{table}]: {', '.join(sorted(unknown))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _sampling(settings: dict[str, Any]) -> Any:
    from accelkit.sample.generate import Sampling

    return Sampling(
        settings["sampler"],
        settings["sampling_steps"],
        settings["guidance"],
        settings["guidance_channels"] or None,
    )


def _stored(ctx: Any, output: Path | None, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of the run in the output directory, by option name."""
    from accelkit.train.rundir import RunDirectory

    settings = resolve(ctx, *layers)
    place = settings["output"] or Path("runs") / _slug(f"finetune-{settings['schedule']}")
    run = RunDirectory(place).stored()
    if not run:
        return {}
    evaluation = run["evaluation"]
    stored = {
        **run["source"],
        **run["train"],
        "schedule": _spelled(run["schedule"]),
        "eval_images": evaluation["images"],
        "eval_batch_size": evaluation["batch_size"],
        "sampler": evaluation["sampling"]["sampler"],
        "sampling_steps": evaluation["sampling"]["steps"],
        "guidance": evaluation["sampling"]["guidance"],
        "guidance_channels": evaluation["sampling"]["guidance_channels"] or 0,
        "output": str(place),
    }
    return {k: v for k, v in stored.items() if v is not None}


def _spelled(stored: dict[str, Any]) -> str:
    schedule = Schedule.from_dict(stored)
    named = schedule.name in preset_names()
    return schedule.name if named else str(schedule)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text)


def _split(text: str) -> list[str]:
    literal = "@" in text
    return [part.strip() for part in text.split(";" if literal else ",") if part.strip()]


def _visited_levels(sampler: str, steps: int) -> list[float]:
    """The noise levels a sampler visits on the linear-beta process of DiT."""
    _prepare_libraries()
    from diffusers import DDIMScheduler

    from accelkit.noise import BETA_END, BETA_START, NoiseAxis
    from accelkit.sample.samplers import make_sampler

    process = DDIMScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear", clip_sample=False
    )
    made = make_sampler(sampler, process, steps)
    return NoiseAxis.of(made).levels(made.timesteps)


def _overview(chosen: list[Schedule], levels: list[float] | None, where: str) -> Table:
    """One schedule a row: a bar per noise level, as high as the depth."""
    bars, width = " ▁▂▃▄▅▆▇█", 20
    table = Table(title=f"blocks run of {chosen[0].layers} ({where})", title_justify="left")
    table.add_column("schedule")
    table.add_column("data → noise", no_wrap=True, min_width=width)
    for heading in ("depths", "mean depth", "ideal saving"):
        table.add_column(heading, justify="left" if heading == "depths" else "right")
    for s in chosen:
        depths = [s.depth_at((i + 0.5) / width) for i in range(width)]
        table.add_row(
            s.name,
            "".join(bars[max(1, round(8 * d / s.layers))] for d in depths),
            " ".join(str(c.depth) for c in s.computes),
            f"{s.mean_depth(levels):.2f}",
            f"{s.ideal_saving(levels):.2%}",
        )
    return table


def _intervals(schedule: Schedule) -> Table:
    """One interval a row, with a bar as long as the depth."""
    table = Table(title=schedule.name or None, title_justify="left")
    table.add_column("noise level")
    table.add_column("blocks", justify="right")
    table.add_column("", no_wrap=True)
    bounds = zip((0.0, *schedule.edges), schedule.edges, schedule.computes, strict=False)
    for low, high, compute in bounds:
        bar = "█" * max(1, round(28 * compute.depth / schedule.layers))
        table.add_row(f"{low:g} – {high:g}", str(compute.depth), bar)
    return table


def _worded(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _shown(settings: dict[str, Any], dry_run: bool, as_json: bool) -> bool:
    """Print the resolved settings if this is a dry run; say whether it is."""
    if not dry_run:
        return False
    hidden = {"dry_run", "as_json", "recipe"}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    plain = {k: v for k, v in plain.items() if k not in hidden}
    if as_json:
        typer.echo(json.dumps(plain, indent=2))
        return True
    table = Table("setting", "value", title="settings", title_justify="left")
    for key, value in plain.items():
        table.add_row(key, str(value))
    out.print(table)
    return True


def _print_rows(rows: list[dict[str, Any]], output: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"output": str(output), "rows": rows}, indent=2))
        return
    table = Table(title=f"results in {output}", title_justify="left")
    for heading in ("schedule", "weights", "FID", "seconds per batch", "time saved", "ideal saving"):
        table.add_column(heading, justify="left" if heading in ("schedule", "weights") else "right")
    for row in rows:
        low, high = row["seconds_quartiles"]
        table.add_row(
            row["schedule"],
            "tuned" if row["tuned"] else "original",
            "–" if row["fid"] is None else f"{row['fid']:.3f}",
            f"{row['seconds']:.2f} ({low:.2f}–{high:.2f})",
            "–" if row["saving"] is None else f"{row['saving']:.1%}",
            f"{row['ideal_saving']:.1%}",
        )
    out.print(table)
