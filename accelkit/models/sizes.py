"""Checks of the sizes in a model's config, before anything is built.

A network is built from its config and only then compared with its weights, so an extra zero in a
size could take all memory, or never finish.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.files.documents import read_object

MOST_LAYERS = 1_000
MOST = 1_000_000
_CONFIGS = ("config.json", "scheduler_config.json")


def check_configs(folder: Path) -> None:
    """Check the configs in a model's folder, and in those of its components if it is a pipeline.

    Raises:
        AccelkitError: a config cannot be read, or has a size that no model has.
    """
    for place in (folder, *(entry for entry in sorted(folder.iterdir()) if entry.is_dir())):
        for path in (place / name for name in _CONFIGS):
            if path.exists():
                _check(path, read_object(path))


def _check(path: Path, config: dict[str, Any]) -> None:
    if "_class_name" not in config:  # Another library has other names for sizes.
        return
    for name, setting in config.items():
        layers = "layers" in name
        most = MOST_LAYERS if layers else MOST
        for value in _numbers(setting):
            if value > most or (layers and value < 0):
                raise AccelkitError(
                    f"{path} has {name} = {value}, expected "
                    + (f"0 to {most:,}" if layers else f"at most {most:,}")
                    + "; download or save the model again"
                )


def _numbers(setting: Any) -> Iterator[int]:
    if isinstance(setting, list):
        for entry in setting:
            yield from _numbers(entry)
    elif isinstance(setting, int):
        yield setting
