"""Checkpoints in the layout of the original repositories, to and from diffusers' models.

Each family has a file with a reader and a writer; the names of the weights show which one to use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelkit.backbones.dit import numerics, restore_numerics
from accelkit.errors import AccelkitError
from accelkit.files.weights import check_model
from accelkit.layouts import dit, uvit
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


_LAYOUTS: dict[str, Any] = {"dit": dit, "uvit": uvit}
"""Modules of the layouts by family, all with the same four names: ``MARK``, a pattern for a weight
that only this layout has; ``KIND``, the class of the models; ``read`` and ``to_original``."""


def load_original(
    path: str | Path, family: str | None = None, num_heads: int | None = None, **config: Any
) -> Any:
    """Return a model with the weights of an original checkpoint, on the CPU in eval mode.

    Sizes are read from the shapes. The dtype is the file's if it has only one, otherwise float32.

    Args:
        path: a checkpoint file, as for :func:`read_state_dict`.
        family: the layout, ``"dit"`` or ``"uvit"``; recognised from the names of the weights if not
            given.
        num_heads: attention heads, which no shape shows; known for the published widths.
        **config: arguments of the model's class that the file does not determine, listed in
            :func:`accelkit.layouts.dit.read` and :func:`accelkit.layouts.uvit.read`.

    Returns:
        A ``DiTTransformer2DModel`` or ``UViTTransformer2DModel`` with the original's outputs.

    Raises:
        AccelkitError: the file is unreadable, the family unknown, weights are missing, unexpected,
            misshapen or not finite, or a setting contradicts the file.
        TypeError: ``num_heads`` or another count is not an integer.
    """
    if family is not None and family not in _LAYOUTS:
        raise AccelkitError(f"family={family!r} is unknown; known: {', '.join(_LAYOUTS)}")
    state, arguments = read_checkpoint(path)
    if family is None:
        marked = (name for name, own in _LAYOUTS.items() if any(map(own.MARK.fullmatch, state)))
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
    """Return the weights of a model in its original's layout, the inverse of :func:`load_original`.

    Args:
        model: a ``DiTTransformer2DModel`` with the original's architecture, or a
            ``UViTTransformer2DModel``.
        allow_inexact: convert even if the original code would compute slightly different outputs.

    Returns:
        Detached tensors by original key, on the model's device and in its dtype.

    Raises:
        AccelkitError: the original layout cannot express the architecture; two blocks of a DiT have
            different copies of the embedders; or its numerics are not the original's and
            ``allow_inexact`` is false.
        TypeError: the model has another class.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    for layout in _LAYOUTS.values():
        if layout.KIND in kinds:
            return layout.to_original(model, allow_inexact)
    known = " or ".join(layout.KIND for layout in _LAYOUTS.values())
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
