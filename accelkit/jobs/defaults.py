"""Default settings of a job that depend on its model and schedule."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelkit.assets import BUILTIN, FINETUNE_RECIPE, builtin
from accelkit.errors import AccelkitError
from accelkit.files.documents import read_json, read_toml
from accelkit.jobs.settings import Source


def finetune_defaults(model: str, schedule: str) -> dict[str, Any]:
    """Return training settings of ``accelkit finetune`` by name."""
    suited = read_toml(FINETUNE_RECIPE, "the recipe") if is_builtin(model) else {}
    return {**suited, **train_defaults(schedule)}


def train_defaults(schedule: str) -> dict[str, Any]:
    """Return training settings of a schedule: depth-varying diffusion supervises every exit."""
    return {"intermediate_weight": 1.0} if schedule.lower().startswith("dvd-") else {}


def bench_defaults(model: str) -> dict[str, Any]:
    """Return settings of :class:`accelkit.bench.protocol.Protocol`; the built-in model is small."""
    return {"images": 500, "batch_size": 250} if is_builtin(model) else {}


def data_of(model: str) -> dict[str, Any]:
    """Return the data of the built-in model."""
    return {"data": "digits"} if is_builtin(model) else {}


def with_data(source: Source) -> Source:
    """Return the source with the built-in model's data if none is named.

    Raises:
        AccelkitError: the model is another, and no data is named.
    """
    source = replace(source, data=source.data or data_of(source.model).get("data", ""))
    if not source.data:
        raise AccelkitError(
            f"give --data with {source.model}: a folder of images, by class or with captions, or a "
            "zip of one; only the built-in model has data of its own"
        )
    return source


def finetune_output(schedule: str) -> Path:
    """Return the default directory of a fine-tuning."""
    return Path("runs") / re.sub(r"[^A-Za-z0-9.-]+", "-", f"finetune-{schedule}")


def is_builtin(model: str) -> bool:
    """Whether a model is the built-in one, or an artifact tuned from it."""
    if model == BUILTIN:
        return True
    stored = Path(model) / "accelkit.json"
    if stored.is_file():
        found = read_json(stored)
        return isinstance(found, dict) and found.get("base_model_name_or_path") == BUILTIN
    return Path(model).exists() and Path(model).resolve() == builtin().resolve()
