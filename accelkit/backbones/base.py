"""What accelkit has to know of a model family, and how a model finds its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from accelkit.errors import AccelkitError


class Backbone(ABC):
    """A model seen as a stack of blocks that a schedule counts.

    Attributes:
        family: the name by which presets are looked up.
        model: the network.
    """

    family: str
    batched: tuple[str, ...]
    """Names of a model call's arguments that have one row per sample, timestep excluded."""
    block_batched: tuple[str, ...]
    """Names of a block call's arguments that have one row per sample, hidden states excluded."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The blocks that a schedule counts, in the order in which they run."""

    @property
    @abstractmethod
    def exit(self) -> nn.Module:
        """The first module that runs after the last block: where every sample meets again."""

    @property
    @abstractmethod
    def null_class(self) -> int:
        """The label that stands for no label; real ones are below it."""

    @property
    def depth(self) -> int:
        """How many blocks a full call runs."""
        return len(self.blocks)

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


def register(class_name: str, backbone: type[Backbone]) -> None:
    """Let models whose class, or a base of it, is called ``class_name`` be read by ``backbone``.

    By name, so that a family costs no import until a model of it turns up.
    """
    _families[class_name] = backbone


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
    candidates = (target, getattr(target, "transformer", None), getattr(target, "unet", None))
    for model in candidates:
        if isinstance(model, nn.Module):
            return getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    raise TypeError(f"expected a diffusers pipeline or a torch module, got {type(target).__name__}")
