"""The commands that train: ``finetune`` and ``train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from accelkit.bench.protocol import Protocol, listed
from accelkit.cli.command import Call, RecipeTable, command
from accelkit.cli.options import DATA_ONLY, Options
from accelkit.cli.progress import TerminalReporter
from accelkit.cli.show import out, print_results
from accelkit.errors import AccelkitError
from accelkit.fields import ESSENTIAL, EVALUATION
from accelkit.jobs.defaults import (
    data_of,
    finetune_defaults,
    finetune_output,
    is_builtin,
    train_defaults,
    with_data,
)
from accelkit.jobs.settings import ModelConfig, Run, Source
from accelkit.sample.sampling import Sampling
from accelkit.schedule import Schedule, check_readable
from accelkit.train.config import AutoencoderConfig, TrainConfig

Baselines = Annotated[
    str,
    typer.Option(
        "--baselines",
        "--baseline",
        help="Alternatives to compare with: tome:RATIO[:B4] (token merging), steps (fewer steps at "
        "equal cost), first_block_cache, faster_cache, pab, taylorseer, mag_cache, cache-dit, "
        "compile, eager (no fused kernels); SCHEDULE+NAME for both; commas between several",
        rich_help_panel=EVALUATION,
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        help="The run to continue in the output directory: 'latest'", rich_help_panel=ESSENTIAL
    ),
]
_UNNAMED = Path("runs/finetune-SCHEDULE")
_MOST_TIMED = 32


def _stored(schedule: str, resume: str | None, run: Run, **_: Any) -> dict[str, Any]:
    """Return the settings of the run that is resumed."""
    if not resume:
        return {}
    from accelkit.jobs.resuming import stored_finetuning

    folder = finetune_output(schedule) if run.output == _UNNAMED else run.output
    if stored := stored_finetuning(folder):
        stored["output"] = str(folder)
    return stored


def _suited(schedule: str, source: Source, **_: Any) -> dict[str, Any]:
    """Return settings that suit the model and the schedule."""
    return {
        **finetune_defaults(source.model, schedule),
        **data_of(source.model),
        "output": str(finetune_output(schedule)),
    }


@command(_stored, _suited)
def finetune(
    call: Call,
    source: Source = Source(data=""),
    schedule: Annotated[
        str,
        typer.Option(
            help="Schedule: D1…D6, uniform:K, depth@edge,… or a file", rich_help_panel=ESSENTIAL
        ),
    ] = "D4",
    run: Run = Run(_UNNAMED),
    resume: Resume = None,
    training: TrainConfig = TrainConfig(steps=10_000),
    baselines: Baselines = "",
    protocol: Annotated[
        Protocol,
        Options(
            only=("images", "batch_size"),
            named={"images": "--eval-images", "batch_size": "--eval-batch-size"},
        ),
    ] = Protocol("full", images=1000, batch_size=250),
    sampling: Annotated[Sampling, Options(named={"steps": "--sampling-steps"})] = Sampling(),
) -> None:
    """Adapt a pretrained model to a schedule, save it and measure what it gained and kept.

    Examples:

      accelkit finetune --schedule D4

      accelkit finetune --schedule D4 --model DiT-XL-2-256x256.pt --data imagenet/train -o runs/d4

      accelkit finetune --schedule D4 --baselines tome:0.3:B4,tome:0.3

      accelkit finetune -o runs/d4 --resume latest

      accelerate launch -m accelkit finetune --schedule D4 --mixed-precision bf16 …
    """
    source = with_data(source)
    run = _resumed(run, resume)
    check_readable(schedule)  # before a model is fetched, which its depths are checked against
    if is_builtin(source.model):
        Schedule.parse(schedule)
    protocol = Protocol(
        methods=";".join([schedule, *listed(baselines)]),
        samplers=(f"{sampling.sampler}:{sampling.steps}",),
        images=protocol.images,
        batch_size=protocol.batch_size,
        # a larger batch may not fit, or take too long
        timing_batch_size=min(_MOST_TIMED, protocol.batch_size, protocol.images),
        guidance=sampling.guidance,
        guidance_channels=sampling.guidance_channels,
        throughput=(),
    )
    if call.is_dry_run():
        return
    from accelkit.jobs.finetune import finetune as job

    with TerminalReporter() as report:
        results = job(source, schedule, training, protocol, run, report)
    if results:
        print_results(results, run.output, call.json)


def _supervised(schedule: str, **_: Any) -> dict[str, Any]:
    return train_defaults(schedule)


@command(_supervised)
def train(
    call: Call,
    source: Annotated[Source, Options(only=DATA_ONLY)] = Source(),
    schedule: Annotated[
        str, typer.Option(help="Schedule of the training", rich_help_panel=ESSENTIAL)
    ] = "full",
    run: Run = Run(Path("runs/train"), checkpoint_every=500),
    resume: Resume = None,
    training: Annotated[
        TrainConfig, Options(without=("lora_rank", "timestep_density", "logit_mean", "logit_std"))
    ] = TrainConfig(
        steps=4000,
        batch_size=128,
        learning_rate=1e-3,
        lr_schedule="cosine",
        lr_warmup_steps=200,
        ema_decay=0.999,
        freeze_time_embedder=False,
    ),
    *,
    model: Annotated[ModelConfig, RecipeTable],
    autoencoder: Annotated[AutoencoderConfig, RecipeTable],
) -> None:
    """Train a small latent DiT or U-ViT from scratch, autoencoder included, sized by a recipe.

    Example:

      accelkit train --recipe recipes/digits_dit.toml -o runs/digits-dit
    """
    run = _resumed(run, resume)
    from accelkit.jobs.scratch import PIPELINE, checked_schedule, scratch

    checked_schedule(schedule, model, autoencoder, training)
    if call.is_dry_run():
        return
    with TerminalReporter() as report:
        scratch(source, schedule, model, autoencoder, training, run, report)
    out.print(f"pipeline at {run.output / PIPELINE}", highlight=False)


def _resumed(run: Run, resume: str | None) -> Run:
    if resume not in (None, "latest"):
        raise AccelkitError(f"--resume takes 'latest', got {resume!r}")
    return replace(run, resume=resume is not None)
