"""Checkpoint files: named tensors, read without running code and written whole, and their checks.

The readers of the families' original layouts are built on these.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.errors import AccelkitError
from accelkit.files.tensors import load_tensors, write_tensors
from accelkit.files.writing import AGAIN, writing

State = dict[str, Tensor]

_PARALLEL = "module."  # before every name, from a training on several devices
_COMPILED = "_orig_mod"  # before the names of a compiled module, at any depth


def read_state_dict(path: str | Path) -> State:
    """Return the weights in a checkpoint file by name, on the CPU, in the dtype they have there.

    The file may be ``.safetensors`` or a PyTorch pickle, which is read with ``weights_only=True``.
    From a training checkpoint the ``ema`` weights are returned if it has them, otherwise its
    ``model``. Names lose the prefixes that wrappers of a module add: ``module.``, from distributed
    training, and ``_orig_mod.``, from ``torch.compile``. (An ``argparse.Namespace`` of arguments is
    accepted, since it holds values only.) Where the format allows, the tensors are mapped from the
    file, so keep it in place while they are in use.

    Raises:
        AccelkitError: as :func:`read_checkpoint`.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[State, dict[str, Any]]:
    """Return the weights, as :func:`read_state_dict`, and the arguments of their training, if kept.

    Raises:
        AccelkitError: there is no such file; it is truncated or corrupt; it is a pickle of more
            than plain data, which could run code; or it holds anything but named tensors.
    """
    path = Path(path)
    if path.is_dir():
        raise AccelkitError(
            f"{path} is a folder; give one checkpoint file (.safetensors, .pt or .pth), or load a "
            "diffusers folder with from_pretrained"
        )
    if not path.is_file():
        raise AccelkitError(f"{path} does not exist; give a checkpoint file")
    if path.stat().st_size == 0:
        raise AccelkitError(f"{path} is empty (0 bytes); download or copy it again")
    content = _load(path)
    recorded = content.get("args") if isinstance(content, Mapping) else None
    arguments = vars(recorded) if isinstance(recorded, argparse.Namespace) else {}
    for key in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise AccelkitError(
            f"{path} holds a {type(content).__name__}; expected a state dict, from names to tensors"
        )
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise AccelkitError(
                f"{path} is not a state dict: {name!r} is a {type(value).__name__}; expected "
                "tensors by name, or a dict with them under 'ema' or 'model'"
            )
    if not content:
        raise AccelkitError(f"{path} holds no tensors; expected a state dict")
    state = {name: value.detach() for name, value in content.items()}
    return _unwrapped(path, state), arguments


def _unwrapped(path: Path, state: State) -> State:
    """Return a state dict without the prefixes that wrappers add to its names."""
    names = {
        name: ".".join(part for part in name.split(".") if part != _COMPILED) for name in state
    }
    while all(name.startswith(_PARALLEL) for name in names.values()):
        names = {old: name.removeprefix(_PARALLEL) for old, name in names.items()}
    if len(set(names.values())) < len(names):
        twice = next(n for n in names.values() if list(names.values()).count(n) > 1)
        raise AccelkitError(
            f"{path} holds {twice} more than once, under names that wrappers of a module were part "
            "of; save the state dict of one model alone"
        )
    return {names[old]: value for old, value in state.items()}


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_tensors(path, "download or copy it again")
        _check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except AccelkitError:
        raise
    except PermissionError:
        raise AccelkitError(f"{path} cannot be opened: permission denied") from None
    except Exception as error:  # A damaged file can raise nearly anything.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise AccelkitError(
                f"{path} is refused: it holds a {refused[1]}, not only tensors, and unpickling "
                "that could run code; if you trust it, save its state dict alone as .safetensors"
            ) from None
        raise AccelkitError(
            f"{path} cannot be read as a checkpoint: truncated, corrupt, or written by neither "
            "safetensors nor torch.save; download or copy it again"
        ) from error


def _check_zip(path: Path) -> None:
    """Raise BadZipFile if a member of a zip archive does not match its checksum.

    torch itself does not compare them.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.CRC:  # 0 where torch was set to leave it out
                with archive.open(member) as file:
                    while file.read(2**20):
                        pass


def write_state_dict(state: State, path: Path) -> None:
    """Write weights as ``.safetensors`` or as a PyTorch pickle, whole or not at all."""
    if path.suffix == ".safetensors":
        write_tensors(path, state, AGAIN)
        return
    with writing(path, AGAIN) as part:
        torch.save(state, part)


@dataclass(frozen=True)
class Original:
    """The weights of a file in the layout of an original, with the checks that readers share.

    Attributes:
        path: the file.
        state: its weights.
        kind: what kind of model they should be, for errors.
        nearest: name of the nearest published configuration, for errors.
    """

    path: str | Path
    state: State
    kind: str
    nearest: str

    def check_names(self, names: Collection[str], optional: Collection[str] = ()) -> None:
        """Raise AccelkitError unless the file has these weights, in floating point, alone."""
        missing = [key for key in names if key not in self.state]
        unexpected = [key for key in self.state if key not in names and key not in optional]
        if missing or unexpected:
            raise AccelkitError(
                f"{self.path} is not a whole {self.kind} (nearest: {self.nearest}); "
                f"missing: {some(missing)}; unexpected: {some(unexpected)}"
            )
        for key, value in self.state.items():
            if not value.is_floating_point():
                raise AccelkitError(
                    f"{self.path}: {key} is {value.dtype}; expected floating point weights"
                )

    def check_shapes(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Raise AccelkitError if a weight does not have the shape expected of its name."""
        wrong = [
            f"{key} {list(value.shape)} (expected {list(expected[key])})"
            for key, value in self.state.items()
            if list(value.shape) != list(expected[key])
        ]
        if wrong:
            raise AccelkitError(
                f"{self.path} is not a {self.kind} (nearest: {self.nearest}); "
                f"wrong shapes: {some(wrong)}"
            )

    def shape(self, key: str, *axes: str) -> list[int]:
        """Return the shape of a weight that should have these axes.

        Raises:
            AccelkitError: it has another number of axes, or an empty one.
        """
        found = list(self.state[key].shape)
        if len(found) != len(axes) or 0 in found:
            raise AccelkitError(
                f"{self.path}: {key} has shape {found}; expected ({', '.join(axes)})"
            )
        return found

    def heads(self, width: int, given: int | None, published: Mapping[int, int]) -> int:
        """Return the number of attention heads, which no shape shows.

        Args:
            width: width of the tokens.
            given: the number that the user gave.
            published: heads of the published models by width.

        Raises:
            AccelkitError: the number is neither given nor known, or does not divide the width.
            TypeError: it is not an integer.
        """
        heads = published.get(width) if given is None else given
        if heads is None:
            raise AccelkitError(
                f"{self.path} has width {width}, which no published {self.kind} has; give "
                "num_heads, which no shape shows"
            )
        check_count("num_heads", heads)
        if width % heads:
            raise AccelkitError(
                f"num_heads={heads} does not divide the width {width} of {self.path}"
            )
        return heads

    def check_settings(
        self, model: type[nn.Module], sizes: dict[str, Any], given: dict[str, Any]
    ) -> None:
        """Check the user's settings against those that the file determines.

        Raises:
            AccelkitError: the model has no such setting, or the file another value.
        """
        known = set(inspect.signature(model.__init__).parameters) - {"self"}
        for name, value in given.items():
            if name not in known:
                raise AccelkitError(
                    f"{name}={value!r} is unknown; known: {', '.join(sorted(known))}"
                )
            if name in sizes and value != sizes[name]:
                raise AccelkitError(
                    f"{name}={value!r} contradicts {self.path}: it has {sizes[name]!r}"
                )


def nearest(published: Mapping[str, Sequence[int]], sizes: Sequence[int]) -> str:
    """Return the name of the published configuration whose sizes have the nearest ratios."""

    def distance(name: str) -> float:
        pairs = zip(sizes, published[name], strict=True)
        return sum(abs(math.log(max(ours, 1) / theirs)) for ours, theirs in pairs)

    return min(published, key=distance)


def materialize(model: nn.Module, state: State) -> None:
    """Allocate a meta model on the CPU, in the only dtype of ``state`` or else in float32."""
    dtypes = {value.dtype for value in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    nn.Module.to(model, dtype).to_empty(device="cpu")  # diffusers' .to warns of half precision


def check_count(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is an integer, AccelkitError if it is below 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise AccelkitError(f"{name}={value}; expected at least 1")


def some(names: Iterable[str], limit: int = 4) -> str:
    """Return at most ``limit`` of the names and the number of the others."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + rest
