"""The commands that train: ``finetune`` and ``train``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from accelkit.cli.options import (
    Accumulation,
    AsJson,
    Baselines,
    BatchSize,
    CheckpointEvery,
    Checkpointing,
    CheckpointsKept,
    ClassMap,
    Data,
    DryRun,
    EmaDecay,
    Flip,
    FreezeTime,
    Guidance,
    GuidanceChannels,
    IntermediateHead,
    IntermediateMatch,
    IntermediateWeight,
    LabelDropout,
    LearningRate,
    LogitMean,
    LogitStd,
    LoraRank,
    LossWeight,
    LossWeightUntil,
    LrSchedule,
    LrWarmup,
    MaxGradNorm,
    Model,
    NumHeads,
    Overwrite,
    Precision,
    PreviewEvery,
    Recipe,
    ReportTo,
    Resume,
    Revision,
    Sampler,
    SkipBad,
    Steps,
    TimestepDensity,
    TrainSeed,
    Vae,
    Variant,
    WeightDecay,
    checked,
    fill_in_data,
    listed,
    made_of_builtin,
    pick,
    reporter,
    run_of,
    source_of,
)
from accelkit.cli.settings import read_recipe, resolve
from accelkit.cli.show import out, print_results, shown
from accelkit.errors import AccelkitError
from accelkit.preset_names import SEQUENTIAL
from accelkit.schedule import Schedule, check_readable


def finetune(
    ctx: typer.Context,
    schedule: Annotated[str, typer.Option(help="D1…D6, uniform:K, depth@edge,… or a file.")] = "D4",
    model: Model = "builtin",
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: runs/finetune-SCHEDULE.")
    ] = None,
    recipe: Recipe = None,
    resume: Resume = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    revision: Revision = None,
    variant: Variant = None,
    vae: Vae = None,
    num_heads: NumHeads = 0,
    class_map: ClassMap = None,
    skip_bad: SkipBad = False,
    flip: Flip = False,
    steps: Steps = 10_000,
    batch_size: BatchSize = 64,
    learning_rate: LearningRate = 2e-5,
    lr_schedule: LrSchedule = "constant",
    lr_warmup_steps: LrWarmup = 0,
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    ema_decay: EmaDecay = 0.9999,
    label_dropout: LabelDropout = 0.1,
    loss_weight: LossWeight = "ones",
    loss_weight_until: LossWeightUntil = 1 / 3,
    intermediate_weight: IntermediateWeight = None,
    intermediate_match: IntermediateMatch = "nearest",
    intermediate_head: IntermediateHead = "shared",
    timestep_density: TimestepDensity = "uniform",
    logit_mean: LogitMean = 0.0,
    logit_std: LogitStd = 1.0,
    lora_rank: LoraRank = 0,
    freeze_time_embedder: FreezeTime = True,
    gradient_accumulation: Accumulation = 1,
    gradient_checkpointing: Checkpointing = False,
    mixed_precision: Precision = "no",
    seed: TrainSeed = 0,
    checkpoint_every: CheckpointEvery = 100,
    checkpoints_kept: CheckpointsKept = 2,
    preview_every: PreviewEvery = 0,
    report_to: ReportTo = None,
    baselines: Baselines = "",
    eval_images: Annotated[int, typer.Option(help="Images per row of the final table.")] = 1000,
    eval_batch_size: Annotated[
        int, typer.Option(help="Of these; of a timed call, no more than 32.")
    ] = 250,
    sampler: Sampler = "auto",
    sampling_steps: Annotated[int, typer.Option(help="Network calls per image.")] = 50,
    guidance: Guidance = 1.0,
    guidance_channels: GuidanceChannels = 0,
) -> None:
    """Adapt a pretrained model to a schedule, save it and measure what it gained and kept.

    Examples:

      accelkit finetune --schedule D4

      accelkit finetune --schedule D4 --model DiT-XL-2-256x256.pt --data imagenet/train -o runs/d4

      accelkit finetune --schedule D4 --baselines tome:0.3:B4,tome:0.3

      accelkit finetune -o runs/d4 --resume latest

      accelerate launch -m accelkit finetune --schedule D4 --mixed-precision bf16 …
    """
    layers = [read_recipe(recipe)] if recipe else []
    if resume:
        layers.append(_stored(ctx, output, layers))
    first = resolve(ctx, *layers)
    if made_of_builtin(first):
        from accelkit.assets import FINETUNE_RECIPE

        layers.append(read_recipe(FINETUNE_RECIPE))
    settings = resolve(ctx, *layers)
    fill_in_data(settings)
    settings["output"] = settings["output"] or Path("runs") / _slug(
        f"finetune-{settings['schedule']}"
    )
    from accelkit.bench.protocol import Protocol
    from accelkit.jobs.common import Run
    from accelkit.train.config import TrainConfig

    _supervise(settings)
    config = pick(TrainConfig, settings)
    check_readable(settings["schedule"])  # before a model is fetched, by which depths are checked
    if made_of_builtin(settings):
        Schedule.parse(settings["schedule"])
    plan = Protocol(
        methods=";".join([settings["schedule"], *listed(settings["baselines"])]),
        samplers=(f"{settings['sampler']}:{settings['sampling_steps']}",),
        images=settings["eval_images"],
        batch_size=settings["eval_batch_size"],
        # more may not fit, or not be worth the wait
        timing_batch_size=min(32, settings["eval_batch_size"], settings["eval_images"]),
        guidance=settings["guidance"],
        guidance_channels=settings["guidance_channels"] or None,
        throughput=(),
    )
    if shown(settings):
        return
    from accelkit.jobs.finetune import finetune as job

    with reporter() as report:
        results = job(
            source_of(settings),
            settings["schedule"],
            config,
            plan,
            run_of(Run, settings),
            report,
        )
    if results:
        print_results(results, settings["output"], settings["as_json"])


def train(
    ctx: typer.Context,
    recipe: Recipe = None,
    data: Data = "digits",
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("runs/train"),
    schedule: Annotated[str, typer.Option(help="Train with it from the start.")] = "full",
    resume: Resume = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    class_map: ClassMap = None,
    skip_bad: SkipBad = False,
    flip: Flip = False,
    steps: Steps = 4000,
    batch_size: BatchSize = 128,
    learning_rate: LearningRate = 1e-3,
    lr_schedule: LrSchedule = "cosine",
    lr_warmup_steps: LrWarmup = 200,
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    ema_decay: EmaDecay = 0.999,
    label_dropout: LabelDropout = 0.1,
    loss_weight: LossWeight = "ones",
    loss_weight_until: LossWeightUntil = 1 / 3,
    intermediate_weight: IntermediateWeight = None,
    intermediate_match: IntermediateMatch = "nearest",
    intermediate_head: IntermediateHead = "shared",
    freeze_time_embedder: FreezeTime = False,
    gradient_accumulation: Accumulation = 1,
    gradient_checkpointing: Checkpointing = False,
    mixed_precision: Precision = "no",
    seed: TrainSeed = 0,
    checkpoint_every: CheckpointEvery = 500,
    checkpoints_kept: CheckpointsKept = 2,
    preview_every: PreviewEvery = 0,
    report_to: ReportTo = None,
) -> None:
    """Train a small latent DiT or U-ViT from scratch, autoencoder included, sized by a recipe.

    Example:

      accelkit train --recipe recipes/digits_dit.toml -o runs/digits-dit
    """
    tables = ("model", "autoencoder")
    layer = read_recipe(recipe, tables) if recipe else {}
    sizes = {name: layer.pop(name, {}) for name in tables}
    settings = resolve(ctx, layer)
    from accelkit.jobs.common import Run
    from accelkit.train.config import TrainConfig

    _supervise(settings)
    config = pick(TrainConfig, settings)
    from accelkit.jobs.fresh import ModelConfig
    from accelkit.jobs.scratch import PIPELINE, checked_schedule, scratch
    from accelkit.train.autoencoder import AutoencoderConfig

    model = checked(ModelConfig, sizes["model"], "model")
    autoencoder = checked(AutoencoderConfig, sizes["autoencoder"], "autoencoder")
    checked_schedule(settings["schedule"], model, autoencoder, config)
    if shown({**settings, **sizes}):
        return
    with reporter() as report:
        scratch(
            source_of(settings),
            settings["schedule"],
            model,
            autoencoder,
            config,
            run_of(Run, settings),
            report,
        )
    out.print(f"pipeline at {settings['output'] / PIPELINE}", highlight=False)


def _stored(ctx: Any, output: Path | None, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of the run in the output directory, by option name."""
    from accelkit.train.rundir import RunDirectory

    settings = resolve(ctx, *layers)
    place = settings["output"] or Path("runs") / _slug(f"finetune-{settings['schedule']}")
    run = RunDirectory(place).stored()
    if run == {}:
        return {}
    try:
        plan = run["evaluation"]
        stored = {
            **run["source"],
            **run["train"],
            "schedule": _spelled(run["schedule"]),
            "baselines": ";".join(listed(plan["methods"])[1:]),
            "eval_images": plan["images"],
            "eval_batch_size": plan["batch_size"],
            "sampler": plan["samplers"][0].rpartition(":")[0],
            "sampling_steps": int(plan["samplers"][0].rpartition(":")[2]),
            "guidance": plan["guidance"],
            "guidance_channels": plan["guidance_channels"] or 0,
            "output": str(place),
        }
    except AccelkitError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise AccelkitError(
            f"the run in {place} is not one of accelkit finetune; resume it with the command that "
            "began it"
        ) from error
    return {k: v for k, v in stored.items() if v is not None}


def _spelled(stored: dict[str, Any]) -> str:
    """How to ask for the schedule again: by its name if that still stands for it."""
    schedule = Schedule.from_dict(stored)
    try:
        named = Schedule.parse(schedule.name, schedule.layers, schedule.family or SEQUENTIAL)
    except AccelkitError:  # the name of a file, say
        return str(schedule)
    return schedule.name if named == schedule else str(schedule)


def _supervise(settings: dict[str, Any]) -> None:
    """Supervise the parts on the way where depth-varying diffusion is asked for and no weight."""
    if settings["intermediate_weight"] is None:
        dvd = settings["schedule"].lower().startswith("dvd-")
        settings["intermediate_weight"] = 1.0 if dvd else 0.0


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text)
