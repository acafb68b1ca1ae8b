"""What accelkit has to know of a model family, and how a model finds its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accelkit.errors import AccelkitError


class Backbone(ABC):
    """A model seen as a stack of blocks that a schedule counts.

    A family whose blocks follow one another, take ``hidden_states`` and return them, has to give
    ``family``, ``blocks`` and ``exit``. The rest says where it differs.

    Attributes:
        family: its name, by which presets are looked up and artifacts are told apart.
        model: the network.
        least: the least depth that can be run.
        sequential: whether nothing runs on a sample after its last block but the exit. False where
            a skipped block still does something (:meth:`skipped`).
        batched: names of a model call's arguments with one row per sample, the timestep excluded,
            the sample itself first. None takes every tensor as long as the batch for one.
        states: what a block takes and returns, in the order in which it returns it.
        hidden: which of the states the exit takes.
        block_batched: names of a block call's arguments with one row per sample, the states
            excluded. None if the batch can't shrink on the way, so that a batch of mixed depths is
            run in one pass per depth.
        timestep_scale: what the model's timestep is of the scheduler's.
    """

    family: str
    least: int = 1
    sequential: bool = True
    batched: tuple[str, ...] | None = None
    states: tuple[str, ...] = ("hidden_states",)
    hidden: str = "hidden_states"
    block_batched: tuple[str, ...] | None = None
    timestep_scale: float = 1.0

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that a schedule counts, in the order in which they run."""

    @property
    def exit(self) -> nn.Module | None:
        """The first module that runs after the last block and takes its hidden states."""
        return None

    @property
    def null_class(self) -> int | None:
        """The label that stands for no label, real ones are below it; None without labels."""
        return None

    @property
    def depth(self) -> int:
        """How many blocks a full call runs."""
        return len(self.blocks)

    def skipped(self, index: int, call: dict[str, Any], depth: int | None) -> Any:
        """Return what block ``index`` would, had it run, for samples that skip it.

        Args:
            index: of the block.
            call: its arguments by name, with the rows of these samples.
            depth: at which all samples of the batch leave; None if they differ.
        """
        states = tuple(call[name] for name in self.states)
        return states if len(states) > 1 else states[0]

    def narrows(self, call: dict[str, Any]) -> bool:
        """Whether the batch can shrink on the way, given the arguments of the model's call."""
        return self.block_batched is not None

    def attentions(self) -> list[list[nn.Module]]:
        """Return the self-attention modules of each block, none where tokens cannot be merged."""
        return [[] for _ in self.blocks]

    def restore(self) -> None:  # noqa: B027 - most families have nothing to restore
        """Apply what the model's config records beyond its class, e.g. an original's numerics."""

    def check(self) -> None:  # noqa: B027 - nor to check
        """Warn of what makes the model's outputs wrong whatever the schedule."""

    @contextmanager
    def training(self, freeze_time: bool = False) -> Iterator[None]:
        """Make the model trainable as its original is, for as long as it is entered."""
        yield

    def notes(self) -> dict[str, Any]:
        """Return what a user should know of this very model, for ``accelkit inspect``."""
        return {}


_families: dict[str, type[Backbone]] = {}


def register_backbone(model: str | type[nn.Module], backbone: type[Backbone]) -> None:
    """Let models of a class, or of one derived from it, be read by ``backbone``.

    Args:
        model: the class, or its name, so that a family costs no import until a model of it
            turns up.
        backbone: the family.
    """
    _families[model if isinstance(model, str) else model.__name__] = backbone


def backbone_of(model: nn.Module) -> Backbone:
    """Return the family's view of ``model``.

    Raises:
        AccelkitError: no family is registered for its class.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in _families:
            return _families[kind.__name__](model)
    raise AccelkitError(
        f"accelkit has no backbone for {type(model).__name__}; "
        f"it knows {', '.join(sorted(_families))}"
    )


def denoiser_of(target: Any) -> nn.Module:
    """Return the network that a pipeline calls at every step, or ``target`` if it is a network.

    Raises:
        TypeError: ``target`` is neither.
    """
    model = called_by(target)
    return getattr(model, "_orig_mod", model)  # what torch.compile wrapped


def called_by(target: Any) -> nn.Module:
    """Return the network of a pipeline as it is called, be it one that torch.compile wrapped.

    Raises:
        TypeError: ``target`` is neither a pipeline nor a network.
    """
    candidates = (target, getattr(target, "transformer", None), getattr(target, "unet", None))
    for model in candidates:
        if isinstance(model, nn.Module):
            return model
    raise TypeError(f"expected a diffusers pipeline or a torch module, got {type(target).__name__}")


def rows(value: Any, index: torch.Tensor | slice) -> Any:
    """Return the rows of a per-sample argument, also within lists and dictionaries.

    None and what all samples share (a number, a single row) pass through.
    """
    if isinstance(value, torch.Tensor):
        return value[index] if value.ndim > 0 and len(value) > 1 else value
    if isinstance(value, (list, tuple)):
        return type(value)(rows(v, index) for v in value)
    if isinstance(value, dict):
        return {k: rows(v, index) for k, v in value.items()}
    return value
