"""Checkpoints in the layout of the original repositories, to and from diffusers' models.

One reader and one writer per family, in a file of its own; the names of the weights tell which.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelkit.backbones.dit import numerics, restore_numerics
from accelkit.errors import AccelkitError
from accelkit.files.weights import check_model
from accelkit.layouts import dit as dit_original
from accelkit.layouts import uvit as uvit_original
from accelkit.layouts.checkpoint import (
    State,
    read_checkpoint,
    read_state_dict,
    some,
    write_state_dict,
)

__all__ = [
    "load_original",
    "numerics",
    "read_state_dict",
    "restore_numerics",
    "save_original",
    "to_original",
]


@dataclass(frozen=True)
class _Layout:
    """How a family's original stores its weights.

    Attributes:
        mark: a name that only this layout has.
        read: makes a model of path, state dict, number of heads, further settings, and the
            arguments of the training, as far as the file has them.
        kind: name of the model's class.
        write: makes the state dict of a model, told whether it may be inexact.
    """

    mark: re.Pattern[str]
    read: Callable[[str | Path, State, int | None, dict[str, Any], dict[str, Any]], Any]
    kind: str
    write: Callable[[Any, bool], State]


_LAYOUTS = {
    "dit": _Layout(
        dit_original.MARK, dit_original.read, "DiTTransformer2DModel", dit_original.to_original
    ),
    "uvit": _Layout(
        uvit_original.MARK,
        lambda path, state, heads, config, _: uvit_original.read(path, state, heads, config),
        "UViTTransformer2DModel",
        lambda model, _: uvit_original.to_original(model),
    ),
}


def load_original(
    path: str | Path, family: str | None = None, num_heads: int | None = None, **config: Any
) -> Any:
    """A model with the weights of an original checkpoint, on the CPU in eval mode.

    Sizes are read off the shapes. The dtype is the file's if it has only one, else float32.

    Args:
        path: a checkpoint file, as for :func:`read_state_dict`.
        family: the layout, ``"dit"`` or ``"uvit"``; recognised from the names of the weights if not
            given.
        num_heads: attention heads, which no shape shows; known for the published widths.
        **config: arguments of the model's class that the file does not settle:
            :func:`accelkit.layouts.dit.read` and
            :func:`accelkit.layouts.uvit.read` name them.

    Returns:
        A ``DiTTransformer2DModel`` or ``UViTTransformer2DModel`` that computes what the original
        does.

    Raises:
        AccelkitError: an unreadable file, an unknown family, missing, unexpected or misshapen
            weights, some that are not finite, or a setting that contradicts the file.
        TypeError: ``num_heads`` or another count is not an integer.
    """
    if family is not None and family not in _LAYOUTS:
        raise AccelkitError(f"family={family!r} is unknown; known: {', '.join(_LAYOUTS)}")
    state, arguments = read_checkpoint(path)
    if family is None:
        marked = (name for name, own in _LAYOUTS.items() if any(map(own.mark.fullmatch, state)))
        family = next(marked, None)
    if family is None:
        raise AccelkitError(
            f"{path} has the layout of no known family ({', '.join(_LAYOUTS)}); it holds "
            f"{some(state)}; weights in diffusers' layout load with from_pretrained"
        )
    model = _LAYOUTS[family].read(path, state, num_heads, config, arguments)
    check_model(model, str(path))
    return model


def to_original(model: Any, allow_inexact: bool = False) -> State:
    """The weights of a model in its original's layout, the inverse of :func:`load_original`.

    Args:
        model: a ``DiTTransformer2DModel`` with the original's architecture, or a
            ``UViTTransformer2DModel``.
        allow_inexact: convert even if the original code would compute something slightly else.

    Returns:
        Detached tensors by original key, on the model's device and in its dtype.

    Raises:
        AccelkitError: the architecture has no original layout; the embedder copies of two blocks
            of a DiT differ; or its numerics are not the original's (and ``allow_inexact`` is
            false).
        TypeError: a model of another class.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    for layout in _LAYOUTS.values():
        if layout.kind in kinds:
            return layout.write(model, allow_inexact)
    known = " or ".join(layout.kind for layout in _LAYOUTS.values())
    raise TypeError(f"expected a {known}, got {type(model).__name__}")


def save_original(model: Any, path: str | Path, allow_inexact: bool = False) -> None:
    """Write :func:`to_original` to a ``.safetensors``, ``.pt`` or ``.pth`` file, whole or not.

    Raises:
        AccelkitError: another suffix, no such folder, or a model that cannot be converted.
        TypeError: a model of a class without an original layout.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise AccelkitError(f"{path} has suffix {path.suffix!r}; give .safetensors, .pt or .pth")
    if not path.parent.is_dir():
        raise AccelkitError(f"{path.parent} is not a folder; create it first")
    write_state_dict(to_original(model, allow_inexact), path)
