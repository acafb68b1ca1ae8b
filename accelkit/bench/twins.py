"""Copies of a network that share its weights, so that compiling one leaves the network as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from accelkit.backbones import called_by
from accelkit.errors import AccelkitError


def twin_of(model: nn.Module, shared: bool) -> nn.Module:
    """Return a copy of a network without a schedule.

    Args:
        model: the network.
        shared: whether the copy has the same parameter objects. If not, it has its own parameters
            in the same memory, until a fused forward joins its weights or the model's.

    Raises:
        AccelkitError: a hook on the model would call the original's modules in the copy too.
    """
    if hooked := [type(m).__name__ for m in model.modules() if "forward" in m.__dict__]:
        raise AccelkitError(
            f"cannot copy this {type(model).__name__} for compiling: its {hooked[0]} has a hook; "
            "remove the hook first"
        )
    kept: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        kept[id(p)] = p if shared else nn.Parameter(p.detach(), p.requires_grad)
    return copy.deepcopy(model, kept)


@contextmanager
def in_place_of_its_own(pipe: Any, network: nn.Module) -> Iterator[None]:
    """Let a pipeline call ``network`` instead of its own network while entered."""
    own = called_by(pipe)
    name = next(n for n in ("transformer", "unet") if getattr(pipe, n, None) is own)
    setattr(pipe, name, network)
    try:
        yield
    finally:
        setattr(pipe, name, own)
