"""Convert DiT and U-ViT checkpoints between the original layout and diffusers' directories."""

from __future__ import annotations

import re
from pathlib import Path

from accelkit.artifact.loading import open_network
from accelkit.artifact.names import ALONE, ORIGINAL_SUFFIXES, named_base
from accelkit.errors import AccelkitError
from accelkit.files.documents import read_object
from accelkit.files.writing import AGAIN
from accelkit.jobs.outputs import save_pipeline
from accelkit.layouts.original import load_original, save_original


def convert(
    source: Path,
    target: Path,
    num_heads: int | None,
    allow_inexact: bool,
    overwrite: bool,
    variant: str | None = None,
) -> Path:
    """Write ``source`` in the other layout to ``target`` and return ``target``.

    A file becomes a directory that the network's ``from_pretrained`` reads. A directory of a
    transformer or a pipeline becomes a file. Every key is accounted for.

    Raises:
        AccelkitError: ``source`` cannot be read or has no original layout, ``target`` exists, or
            the conversion is inexact.
    """
    if target.exists() and not overwrite:
        raise AccelkitError(f"{target} exists; replace it with --overwrite")
    if not source.is_dir():
        if target.suffix in ORIGINAL_SUFFIXES:
            raise AccelkitError(
                f"{source} is read as an original-layout file, so the target is a directory, "
                f"not {target.name}"
            )
        _check_replaced(target)
        model = load_original(source, num_heads=num_heads)
        save_pipeline(model, target, AGAIN)
        return target
    folder = source / "transformer" if (source / "model_index.json").is_file() else source
    if not (folder / "config.json").is_file():
        raise AccelkitError(f"{source} is no model directory: it has no config.json")
    if not named_base(folder).alone:
        named = read_object(folder / "config.json").get("_class_name")
        raise AccelkitError(
            f"{source} holds a {named}; the networks with an original layout are {', '.join(ALONE)}"
        )
    save_original(open_network(folder, variant=variant), target, allow_inexact=allow_inexact)
    return target


_WRITTEN = re.compile(r"config\.json|diffusion_pytorch_model.*\.(safetensors|index\.json)")


def _check_replaced(target: Path) -> None:
    """Raise AccelkitError for a directory with files that no conversion wrote."""
    entries = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if others := [name for name in entries if not _WRITTEN.fullmatch(name)]:
        raise AccelkitError(
            f"{target} holds {others[0]}, which no conversion wrote and --overwrite does not "
            "remove; give another target"
        )
