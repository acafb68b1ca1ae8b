"""Options that several commands share, and settings classes built from them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from accelkit.errors import AccelkitError
from accelkit.files.documents import is_utf8, read_json

Model = Annotated[
    str, typer.Option(help="builtin, a directory, an original-layout file or a hub id.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the model's weights, such as fp16.")]
Vae = Annotated[
    str | None,
    typer.Option(help="Directory or hub id of an original-layout file's autoencoder."),
]
NumHeads = Annotated[
    int, typer.Option(min=0, help="Attention heads of an original-layout file; 0: as published.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, a folder of images (by class or with captions) or a zip of one. Default for "
        "the built-in model: digits."
    ),
]
ClassMap = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help='Labels of the data\'s classes: a JSON object such as {"cat": 3, "dog": 5}, or the '
        "names of all the model's classes, one a line. Default: 0, 1, … in the names' order.",
    ),
]
SkipBad = Annotated[bool, typer.Option(help="Go on without images that cannot be read.")]
Recipe = Annotated[Path | None, typer.Option(help="TOML file that sets any of these options.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what an earlier run left there.")]
DryRun = Annotated[bool, typer.Option(help="Print the resolved settings and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Sampler = Annotated[
    str,
    typer.Option(
        help="ddpm, ddim, dpm (DPM-Solver++), dpm-fast (single-step), em (for a continuous VP SDE) "
        "or flow (for flow matching). Default: flow where the model's scheduler is of flow "
        "matching, else ddim."
    ),
]
Baselines = Annotated[
    str,
    typer.Option(
        "--baselines",
        "--baseline",
        help="Alternatives to compare with: tome:RATIO[:B4] (token merging), steps (fewer, at "
        "equal cost), first_block_cache, faster_cache, pab, taylorseer, mag_cache, cache-dit, "
        "compile, eager (no fused kernels); with a schedule and a plus in front, both. Commas "
        "between several.",
    ),
]
Kernels = Annotated[
    str,
    typer.Option(
        help="auto: run schedules by fused forward passes where the family has one; off: by the "
        "model's own modules."
    ),
]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")]
GuidanceChannels = Annotated[
    int, typer.Option(help="Latent channels that are guided, 0 for all (the original DiT: 3).")
]
Flip = Annotated[bool, typer.Option(help="Train on mirrored images as well.")]
Resume = Annotated[str | None, typer.Option(help="'latest': go on with the run there.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
BatchSize = Annotated[int, typer.Option(help="Samples per step, over all processes.")]
LearningRate = Annotated[float, typer.Option(help="Peak rate of AdamW.")]
LrSchedule = Annotated[str, typer.Option(help="constant, or cosine to 0.")]
LrWarmup = Annotated[int, typer.Option(help="Steps in which the rate rises from 0.")]
WeightDecay = Annotated[float, typer.Option(help="Of AdamW.")]
MaxGradNorm = Annotated[float, typer.Option(help="Gradients are clipped to it.")]
EmaDecay = Annotated[float, typer.Option(help="Of the EMA teacher.")]
LabelDropout = Annotated[float, typer.Option(help="Share trained without label, for guidance.")]
LossWeight = Annotated[
    str, typer.Option(help="lambda(t): ones, or ramp (0.1 at the data to 1 at noise).")
]
LossWeightUntil = Annotated[float, typer.Option(help="Share of the run after which lambda is 1.")]
TimestepDensity = Annotated[
    str, typer.Option(help="Of a flow-matching model's timesteps: uniform or logit-normal (SD3).")
]
LogitMean = Annotated[float, typer.Option(help="Of logit-normal timesteps; above 0: more noise.")]
LogitStd = Annotated[float, typer.Option(help="Of logit-normal timesteps.")]
IntermediateWeight = Annotated[
    float | None,
    typer.Option(
        help="Of the losses at the exits that a sample passes by; 0: off. "
        "Default: 1 with a dvd schedule, else 0."
    ),
]
IntermediateMatch = Annotated[
    str,
    typer.Option(
        help="Noise level that such an exit's target is taken from, among its own: nearest to the "
        "sample's, relative, middle or random."
    ),
]
IntermediateHead = Annotated[
    str,
    typer.Option(
        help="What makes a prediction at such an exit: the network's head, shared, or the exit's "
        "own, which is left behind when training ends."
    ),
]
LoraRank = Annotated[
    int, typer.Option(help="Train adapters of this rank in place of all weights; 0: off.")
]
FreezeTime = Annotated[bool, typer.Option(help="Keep the timestep embedder as it is.")]
Accumulation = Annotated[int, typer.Option(help="Parts that a batch is run in.")]
Checkpointing = Annotated[bool, typer.Option(help="Recompute blocks to save memory.")]
Precision = Annotated[
    str, typer.Option(help="no, bf16 or fp16.", envvar="ACCELERATE_MIXED_PRECISION")
]
TrainSeed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
CheckpointEvery = Annotated[int, typer.Option(min=0, help="Steps; 0: only at the end.")]
CheckpointsKept = Annotated[int, typer.Option(min=0, help="The newest ones; 0: all.")]
PreviewEvery = Annotated[int, typer.Option(min=0, help="Steps between preview grids; 0: none.")]
ReportTo = Annotated[str | None, typer.Option(help="tensorboard, wandb, …")]


def pick(kind: Any, settings: dict[str, Any]) -> Any:
    """Build a settings class from the settings of the same names."""
    return kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})


def source_of(settings: dict[str, Any]) -> Any:
    """Build the names of model and data; 0 heads means those of the published table."""
    from accelkit.jobs.common import Source

    return pick(Source, {**settings, "num_heads": settings.get("num_heads") or None})


def made_of_builtin(settings: dict[str, Any]) -> bool:
    """Whether the model is the built-in one, or an artifact that was tuned from it."""
    model = settings["model"]
    if model == "builtin":
        return True
    from accelkit.assets import BUILTIN, builtin

    stored = Path(model) / "accelkit.json"
    if stored.is_file():
        found = read_json(stored)
        return isinstance(found, dict) and found.get("base_model_name_or_path") == BUILTIN
    return Path(model).exists() and Path(model).resolve() == builtin().resolve()


def fill_in_data(settings: dict[str, Any]) -> None:
    """Take the digits for the built-in model; AccelkitError where another's data are not named."""
    if settings["data"] is None and not made_of_builtin(settings):
        raise AccelkitError(
            f"give --data with {settings['model']}: a folder of images, by class or with captions, "
            "or a zip of one; digits is the built-in model's"
        )
    settings["data"] = settings["data"] or "digits"


def check_output(path: Path) -> None:
    """Raise AccelkitError for a directory whose weights could be written and not read again."""
    if not is_utf8(path):
        raise AccelkitError(
            f"the path of the output {path} is not UTF-8, and safetensors reads from no other; "
            "give another -o"
        )


def run_of(kind: Any, settings: dict[str, Any]) -> Any:
    """Build the run's settings, whose options are named for the command line."""
    check_output(settings["output"])
    if settings["resume"] not in (None, "latest"):
        raise AccelkitError(f"--resume takes 'latest', got {settings['resume']!r}")
    return kind(
        output=settings["output"],
        resume=settings["resume"] is not None,
        overwrite=settings["overwrite"],
        checkpoint_every=settings["checkpoint_every"],
        keep=settings["checkpoints_kept"],
        preview_every=settings["preview_every"],
        report_to=settings["report_to"] or None,
    )


def listed(text: str) -> list[str]:
    """Split at semicolons, which literals need, or else at commas but those of a name's options."""
    between = ";" if "@" in text or ";" in text else r",(?!\s*\w+=)"
    return [part.strip() for part in re.split(between, text) if part.strip()]


def tuned_weights(text: str) -> dict[str, str]:
    """Read which artifact is tuned for which schedule."""
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


def checked(kind: Any, values: Any, table: str) -> Any:
    """Build a settings class from a recipe's table, refusing unknown names."""
    if not isinstance(values, dict):
        raise AccelkitError(f"[{table}] is a table of settings, the recipe has {values!r}")
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise AccelkitError(f"unknown settings in [{table}]: {', '.join(sorted(unknown))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def sampling_of(settings: dict[str, Any]) -> Any:
    """Build the sampling settings; 0 guided channels means all."""
    from accelkit.sample.generate import Sampling

    return Sampling(
        settings["sampler"],
        settings["sampling_steps"],
        settings["guidance"],
        settings["guidance_channels"] or None,
    )


def reporter() -> Any:
    """Return what draws a job's progress."""
    from accelkit.cli.progress import TerminalReporter

    return TerminalReporter()
