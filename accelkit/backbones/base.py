"""What accelkit has to know of a model family, and how a model finds its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accelkit.backbones.example import arguments
from accelkit.errors import AccelkitError

TIMES = {"t": (1.0, 0.0), "t / 1000": (1e-3, 0.0), "1 - t / 1000": (-1e-3, 1.0)}
"""What networks are given of a scheduler's timestep t: a t + b, by how it is written."""


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
        layout: in which order the sample has its axes: batch, channels, frames, height, width, or
            batch, tokens (N), channels.
        timestep_scale: what the model's timestep is of the scheduler's.
        timestep_per_token: whether the model may be given a timestep for every token.
        timestep_guessed: whether that is a guess, which calls are to be compared with.
        head: names of the parameters, or of modules that hold them, which make the last hidden
            states a prediction, of which a model may lack some. By them training can give earlier
            exits heads of their own (:mod:`accelkit.train.dvd`).
        tokens_protected: how many tokens stand before the map in self-attention (:meth:`grid`) and
            are never merged, e.g. one for the time.
    """

    family: str
    least: int = 1
    sequential: bool = True
    batched: tuple[str, ...] | None = None
    states: tuple[str, ...] = ("hidden_states",)
    hidden: str = "hidden_states"
    head: tuple[str, ...] = ("norm_out", "scale_shift_table", "proj_out")
    block_batched: tuple[str, ...] | None = None
    layout: str = "BCHW"
    timestep_scale: float = 1.0
    timestep_per_token: bool = False
    timestep_guessed: bool = False
    tokens_protected: int = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module] | nn.ModuleList:
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
    def num_classes(self) -> int | None:
        """How many labels there are, the null class not counted; None without labels."""
        return self.null_class

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
        return self.passed_on(call)

    def passed_on(self, call: dict[str, Any]) -> Any:
        """Return the states of a block's call as a block returns them."""
        states = tuple(call[name] for name in self.states)
        return states if len(states) > 1 else states[0]

    def shortcut(
        self, depth: int, hidden: torch.Tensor
    ) -> Callable[[list[dict[str, Any]]], Any] | None:
        """Return what makes up for all blocks from ``depth`` on at once, None if nothing does.

        It is given the arguments of those blocks' calls by name, the states in them those of the
        first one, and returns what the last one would. Without it :meth:`skipped` is asked of each.

        Args:
            depth: at which all samples of the batch leave.
            hidden: the states there.
        """
        return None

    def prepare(self, depth: int) -> None:  # noqa: B027 - few families have anything to
        """Make ready, outside of a compiled graph, what a pass of no gradients needs.

        Args:
            depth: at which all of its samples leave.
        """

    def narrows(self, call: dict[str, Any]) -> bool:
        """Whether the batch can shrink on the way, given the arguments of the model's call."""
        return self.block_batched is not None

    def timestep(self, call: dict[str, Any]) -> Any:
        """Return the timestep of a model's call, one value or one per sample, as the model sees it.

        Raises:
            AccelkitError: the call has none, or none that gives a sample one noise level.
        """
        if call.get("timestep") is None:
            raise AccelkitError(
                "a model with a schedule needs its timestep to know the noise level; got None"
            )
        timestep = call["timestep"]
        several = isinstance(timestep, torch.Tensor) and timestep.shape[1:].numel() > 1
        if several and self.timestep_per_token:  # others refuse it themselves
            raise AccelkitError(
                f"this {type(self.model).__name__} is given a timestep for every token, "
                f"{tuple(timestep.shape)}, so that a sample has no one noise level to schedule; "
                "call accelkit.disable"
            )
        return timestep

    def model_timestep(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return what the model is given for timesteps of the scheduler."""
        return timestep if self.timestep_scale == 1 else timestep * self.timestep_scale

    def scheduler_timestep(self, timestep: float) -> float:
        """Return the scheduler's timestep of one that the model is given."""
        return timestep / self.timestep_scale

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The networks that embed the timestep, which fine-tuning can leave alone."""
        return []

    @property
    def all_blocks(self) -> Sequence[nn.Module] | nn.ModuleList:
        """Every block of the model in the order in which they run, counted or not."""
        return self.blocks

    def attentions(self) -> list[list[nn.Module]]:
        """Return the self-attention modules in which tokens may be merged.

        One list for each of ``all_blocks``, by which a merging's placement counts. Such a module is
        called with tokens (B, N, D) first and returns as many of the same width; it must not mind
        in which order they stand, so positions have to be part of the tokens. Empty lists where
        that is not so: a schedule that merges is then refused.
        """
        return [[] for _ in self.all_blocks]

    def grid(self, call: dict[str, Any]) -> tuple[int, int]:
        """Return height and width of the map of tokens, given the arguments of the model's call.

        Asked of families with attention modules to merge in. Here: one token for a patch of the
        sample (B, C, H, W), whose name stands first in ``batched``.
        """
        assert self.batched is not None
        sample, patch = call[self.batched[0]], self.model.config.patch_size  # type: ignore[union-attr]
        return sample.shape[-2] // patch, sample.shape[-1] // patch

    def example(self, batch: int = 1, device: torch.device | str = "meta") -> dict[str, Any]:
        """Return the arguments of a call of ``batch`` samples whose numbers nobody looks at.

        They are in the model's dtype and of the sizes that its config tells, usual ones where it
        tells none (:mod:`accelkit.backbones.example`).

        Raises:
            AccelkitError: the model takes something of which it is not known what it is to hold.
        """
        return arguments(self.model, self.layout, batch, device)

    def restore(self) -> None:  # noqa: B027 - most families have nothing to restore
        """Apply what the model's config records beyond its class, e.g. an original's numerics."""

    def check(self) -> None:  # noqa: B027 - nor to check
        """Warn of what makes the model's outputs wrong whatever the schedule."""

    @contextmanager
    def training(self, freeze_time: bool = False) -> Iterator[None]:
        """Make the model trainable as its original is, for as long as it is entered.

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
        """Return what a user should know of this very model, for ``accelkit inspect``."""
        return {}


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
