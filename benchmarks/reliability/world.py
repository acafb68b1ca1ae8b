"""Tiny models and images for all trials, and commands that finish in seconds."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

import accelkit
from accelkit.artifact import artifact
from accelkit.layouts.original import save_original

SCHEDULE = "4@0.5,2@1"
_SEVERAL = ["--model", "model", "--data", "data"]
_RECIPE = """
data = "data"
steps = 3
batch_size = 2
lr_warmup_steps = 0
checkpoint_every = 1
[model]
image_size = 8
layers = 2
heads = 2
head_dim = 8
num_classes = 2
[autoencoder]
channels = [8]
steps = 2
batch_size = 2
"""


@dataclass(frozen=True)
class Job:
    """A command, and the part of its output that interruptions must not change.

    Attributes:
        name: name of the command.
        arguments: its arguments, with the name.
        output: the folder that it writes to.
        result: function of that folder that returns the values to compare, by name.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    result: Callable[[Path], dict[str, str]]


def build(folder: Path) -> None:
    """Write a pipeline, an original-layout file, an artifact, images and recipes."""
    folder.mkdir(parents=True)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=4,
        norm_eps=1e-6,
    ).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(model, vae, DDIMScheduler())
    pipe.save_pretrained(folder / "model")
    accelkit.enable(pipe, SCHEDULE)
    artifact.save(pipe, folder / "artifact", base_model=str(folder / "model"))
    accelkit.disable(pipe)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    for name in ("dit.pt", "dit.safetensors"):
        save_original(model, folder / name, allow_inexact=True)
    for number, name in enumerate(("ant", "bee")):
        (folder / "data" / name).mkdir(parents=True)
        for place in range(3):
            shade = 40 * (3 * number + place)
            Image.new("RGB", (8, 8), (shade, 255 - shade, 99)).save(
                folder / "data" / name / f"{place}.png"
            )
    (folder / "train.toml").write_text(_RECIPE)


def copy_world(world: Path, folder: Path) -> None:
    """Copy the world's files into a trial's folder; some trials change them."""
    shutil.copytree(world, folder, dirs_exist_ok=True)


def _digests(folder: Path, pattern: str) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


def _rows(folder: Path) -> dict[str, str]:
    """Return the figures of results.json that do not depend on time."""
    path = folder / "results.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = ("method", "weights", "sampler", "steps", "macs", "fid", "ideal_saving", "skipped")
    return {
        f"row {row['method']} {row['weights']} {row['sampler']}": json.dumps(
            {name: row.get(name) for name in kept}
        )
        for row in rows
    }


def _tuned(folder: Path) -> dict[str, str]:
    return _digests(folder, "accelkit.safetensors") | _rows(folder)


def _pictures(folder: Path) -> dict[str, str]:
    return _digests(folder, "*.png")


def _pipeline(folder: Path) -> dict[str, str]:
    return _digests(folder / "pipeline", "*.safetensors")


def _job(output: str, result: Callable[[Path], dict[str, str]], name: str, *more: str) -> Job:
    return Job(name, (name, *more, "-o", output), output, result)


FINETUNE = _job(
    "tuned",
    _tuned,
    "finetune",
    *_SEVERAL,
    *("--schedule", SCHEDULE, "--steps", "4", "--batch-size", "4", "--checkpoint-every", "1"),
    *("--eval-images", "2", "--eval-batch-size", "2", "--sampling-steps", "2"),
)
BENCH = _job(
    "bench",
    _rows,
    "bench",
    *_SEVERAL,
    *("--schedules", SCHEDULE, "--samplers", "auto:2", "--baselines", "", "--throughput", "1"),
    *("-n", "2", "--rounds", "1", "--timing-batch-size", "1"),
)
SAMPLE = _job(
    "samples",
    _pictures,
    "sample",
    *("--model", "artifact", "-n", "4", "--batch-size", "1", "--steps", "2"),
)
TRAIN = _job("trained", _pipeline, "train", "--recipe", "train.toml")
JOBS = (FINETUNE, BENCH, SAMPLE, TRAIN)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names under which two results differ."""
    names = sorted(found.keys() | expected)
    return [name for name in names if found.get(name) != expected.get(name)]
