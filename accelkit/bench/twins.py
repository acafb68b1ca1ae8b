"""Copies of a network on its weights, so that it stays as it is while one of them is compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from accelkit.backbones import called_by
from accelkit.errors import AccelkitError


def twin_of(model: nn.Module, shared: bool) -> nn.Module:
    """Return a copy of ``model``, which runs no schedule.

    Args:
        model: the network.
        shared: whether the copy has the very same parameters. If not, its own are on the same
            memory, until a fused forward joins its weights or the model's.

    Raises:
        AccelkitError: something hooked on the model would go on running the original's modules.
    """
    if hooked := [type(m).__name__ for m in model.modules() if "forward" in m.__dict__]:
        raise AccelkitError(
            f"this {type(model).__name__} cannot be copied to be compiled, as something is hooked "
            f"on its {hooked[0]}"
        )
    kept: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        kept[id(p)] = p if shared else nn.Parameter(p.detach(), p.requires_grad)
    return copy.deepcopy(model, kept)


@contextmanager
def in_place_of_its_own(pipe: Any, network: nn.Module) -> Iterator[None]:
    """Let a pipeline call another network than its own while entered."""
    own = called_by(pipe)
    name = next(n for n in ("transformer", "unet") if getattr(pipe, n, None) is own)
    setattr(pipe, name, network)
    try:
        yield
    finally:
        setattr(pipe, name, own)
