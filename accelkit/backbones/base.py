"""What accelkit needs to know about a family of models: the class :class:`Backbone`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accelkit.backbones.example import arguments
from accelkit.errors import AccelkitError

TIMES = {"t": (1.0, 0.0), "t / 1000": (1e-3, 0.0), "1 - t / 1000": (-1e-3, 1.0)}
"""Scale and offset of the timesteps that networks are given, by how they are written."""

_NAMES = ("blocks", "all_blocks", "exit", "time_embedders")
"""Attributes that a family may set to the dotted names of its modules."""


class Backbone(ABC):
    """A model seen as a stack of blocks that a schedule counts.

    A family whose blocks follow one another, take ``hidden_states`` and return them, sets
    ``family``, ``blocks`` and ``exit``; everything else describes a difference from that.

    ``blocks``, ``all_blocks``, ``exit`` and ``time_embedders`` are properties. A family may set
    them to a dotted name, which stands for that module of the model, or to a tuple of names, which
    stands for these modules in order, a list of modules counting as its elements.

    Attributes:
        family: name of the family, used to look up presets and to identify artifacts.
        model: the network.
        least: the smallest depth that can be run.
        sequential: whether nothing but the exit runs on a sample after its last block. False where
            a skipped block still does something (:meth:`skipped`).
        batched: names of the arguments of a model's call with one row per sample, without the
            timestep, the sample itself first. None means every tensor as long as the batch.
        states: names of what a block takes and returns, in the order in which it returns them.
        hidden: the state that the exit takes.
        block_batched: names of the arguments of a block's call with one row per sample, without the
            states. None if the batch cannot shrink on the way; a batch of mixed depths is then run
            in one pass per depth.
        residuals: names of arguments of a model's call that keep the batch from shrinking when they
            are given, such as the residuals of a ControlNet, which have a row for every sample.
        self_attention: name of the attention in each of ``all_blocks`` in which tokens may be
            merged (:meth:`attentions`); None if there is none.
        layout: axes of the sample in order: batch, channels, frames, height, width, or batch,
            tokens (N), channels.
        timestep_scale, timestep_offset: the model is given ``scale * t + offset`` for the
            scheduler's timestep t.
        timestep_per_token: whether the model accepts a timestep for every token.
        timestep_guessed: whether scale and offset are guesses, which calls are checked against.
        head: names of the parameters, or of the modules that hold them, that turn the last hidden
            states into a prediction. A model may lack some of them. With these, training can give
            earlier exits heads of their own (:mod:`accelkit.train.dvd`).
        tokens_protected: number of tokens in front of the map in self-attention (:meth:`grid`) that
            are never merged, such as one for the time.
    """

    family: str
    least: int = 1
    sequential: bool = True
    batched: tuple[str, ...] | None = None
    states: tuple[str, ...] = ("hidden_states",)
    hidden: str = "hidden_states"
    head: tuple[str, ...] = ("norm_out", "scale_shift_table", "proj_out")
    block_batched: tuple[str, ...] | None = None
    residuals: tuple[str, ...] = ()
    self_attention: str | None = None
    layout: str = "BCHW"
    timestep_scale: float = 1.0
    timestep_offset: float = 0.0
    timestep_per_token: bool = False
    timestep_guessed: bool = False
    tokens_protected: int = 0

    def __init_subclass__(cls) -> None:
        """Turn the names of modules that a family sets into properties."""
        super().__init_subclass__()
        for name in _NAMES:
            value = vars(cls).get(name)
            if isinstance(value, (str, tuple)):
                setattr(cls, name, _modules(value))

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def blocks(self) -> Any:
        """The blocks that a schedule counts, a sequence in the order in which they run."""

    @property
    def all_blocks(self) -> Any:
        """Every block of the model in the order in which they run, counted or not."""
        return self.blocks

    @property
    def exit(self) -> Any:
        """The first module after the last block that takes its hidden states; None if none does."""
        return None

    @property
    def time_embedders(self) -> Any:
        """The networks that embed the timestep, which fine-tuning can freeze."""
        return []

    @property
    def null_class(self) -> int | None:
        """The label for "no label", which follows the real ones; None without labels."""
        return None

    @property
    def num_classes(self) -> int | None:
        """The number of labels without the null class; None without labels."""
        return self.null_class

    @property
    def depth(self) -> int:
        """The number of blocks that a full call runs."""
        return len(self.blocks)

    def skipped(self, index: int, call: dict[str, Any], depth: int | None) -> Any:
        """Return the states that block ``index`` returns for samples that skip it.

        Args:
            index: index of the block.
            call: the block's arguments by name, with the rows of these samples.
            depth: the depth at which all samples of the batch exit; None if they differ.
        """
        return self.passed_on(call)

    def passed_on(self, call: dict[str, Any]) -> Any:
        """Return the states in a block's arguments in the form in which a block returns them."""
        states = tuple(call[name] for name in self.states)
        return states if len(states) > 1 else states[0]

    def shortcut(
        self, depth: int, hidden: torch.Tensor
    ) -> Callable[[list[dict[str, Any]]], Any] | None:
        """Return a function that stands in for all blocks from ``depth`` on, None without one.

        The function takes the arguments of those blocks' calls by name, with the states of the
        first block in all of them, and returns the last block's output. Without it, each block's
        output comes from :meth:`skipped`.

        Args:
            depth: the depth at which all samples of the batch exit.
            hidden: the hidden states there.
        """
        return None

    def prepare(self, depth: int) -> None:  # noqa: B027 - few families need to
        """Prepare, outside a compiled graph, for a pass without gradients.

        Args:
            depth: the depth at which all samples of the pass exit.
        """

    def narrows(self, call: dict[str, Any]) -> bool:
        """Whether the batch can shrink on the way, given the arguments of the model's call."""
        return self.block_batched is not None and all(call.get(n) is None for n in self.residuals)

    def timestep(self, call: dict[str, Any]) -> Any:
        """Return the timestep in the arguments of a model's call: one value, or one per sample.

        Raises:
            AccelkitError: there is no timestep, or not exactly one noise level per sample.
        """
        if call.get("timestep") is None:
            raise AccelkitError(
                "a model with a schedule needs its timestep to know the noise level; got None"
            )
        timestep = call["timestep"]
        several = isinstance(timestep, torch.Tensor) and timestep.shape[1:].numel() > 1
        if several and self.timestep_per_token:  # other models refuse it themselves
            raise AccelkitError(
                f"this {type(self.model).__name__} is given a timestep for every token, "
                f"{tuple(timestep.shape)}, so a sample has no single noise level to schedule; "
                "call accelkit.disable"
            )
        return timestep

    def model_timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return the timesteps that the model is given for timesteps of the scheduler."""
        if (self.timestep_scale, self.timestep_offset) == (1, 0):
            return timestep
        return timestep * self.timestep_scale + self.timestep_offset

    def scheduler_timestep(self, timestep: float) -> float:
        """Return the scheduler's timestep for one that the model is given."""
        return (timestep - self.timestep_offset) / self.timestep_scale

    def attentions(self) -> list[list[nn.Module]]:
        """Return the self-attention modules in which tokens may be merged, a list per block.

        The lists follow ``all_blocks``, on which the placement of a merging is counted. Such a
        module takes tokens (B, N, D) as its first argument and returns as many of the same width.
        It must not depend on their order, so positions have to be part of the tokens. If all lists
        are empty, a schedule that merges is refused.
        """
        named = self.self_attention
        return [[] if named is None else [getattr(block, named)] for block in self.all_blocks]

    def grid(self, call: dict[str, Any]) -> tuple[int, int]:
        """Return height and width of the map of tokens, given the arguments of the model's call.

        Only needed by families that allow merging. By default a token stands for a patch of the
        sample (B, C, H, W), whose name is first in ``batched``.
        """
        assert self.batched is not None
        sample, patch = call[self.batched[0]], self.model.config.patch_size  # type: ignore[union-attr]
        return sample.shape[-2] // patch, sample.shape[-1] // patch

    def example(self, batch: int = 1, device: torch.device | str = "meta") -> dict[str, Any]:
        """Return arguments for a call of ``batch`` samples whose values do not matter.

        They have the model's dtype and the sizes in its config, or usual ones where the config has
        none (:mod:`accelkit.backbones.example`).

        Raises:
            AccelkitError: the meaning of a required argument is not known.
        """
        return arguments(self.model, self.layout, batch, device)

    def restore(self) -> None:  # noqa: B027 - most families have nothing to restore
        """Apply what the config records beyond the class, such as an original's numerics."""

    def check(self) -> None:  # noqa: B027 - most families have nothing to check
        """Warn of anything that makes the model's outputs wrong whatever the schedule."""

    @contextmanager
    def training(self, freeze_time: bool = False) -> Iterator[None]:
        """Make the model trainable like its original while the context is entered.

        Args:
            freeze_time: keep the timestep embedders out of the training.
        """
        frozen = [p for m in self.time_embedders for p in m.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(not freeze_time)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_()

    def notes(self) -> dict[str, Any]:
        """Return facts about this particular model for ``accelkit inspect``."""
        return {}


def _modules(names: str | tuple[str, ...]) -> property:
    """Return a property for the module, or the modules, of these dotted names."""

    def found(backbone: Backbone) -> Any:
        if isinstance(names, str):
            return _module(backbone.model, names)
        modules: list[nn.Module] = []
        for part in (_module(backbone.model, name) for name in names):
            modules += part if isinstance(part, nn.ModuleList) else [part]
        return modules

    return property(found)


def _module(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part)
    return model


def rows(value: Any, index: torch.Tensor | slice) -> Any:
    """Return the rows of a per-sample argument, also within lists and dictionaries.

    None and values that all samples share (a number, a single row) are returned as they are.
    """
    if isinstance(value, torch.Tensor):
        return value[index] if value.ndim > 0 and len(value) > 1 else value
    if isinstance(value, (list, tuple)):
        return type(value)(rows(v, index) for v in value)
    if isinstance(value, dict):
        return {k: rows(v, index) for k, v in value.items()}
    return value
