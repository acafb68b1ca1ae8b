"""The model under work: a network with its pipeline, its family and its noise axis."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from accelkit.backbones import Backbone, backbone_of, denoiser_of
from accelkit.backbones.conditioning import Conditioning, conditioning_of
from accelkit.backbones.watched import learn
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under work, made once by :meth:`of` and handed on.

    Attributes:
        target: the pipeline, or the network alone.
        model: the network.
        given: a scheduler that stands in for the pipeline's.
    """

    target: Any
    model: Any
    given: Any = None
    _made: dict[Hashable, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, target: Any, scheduler: Any = None) -> Subject:
        """Return the subject of a pipeline, a network or a subject; TypeError for anything else.

        The scheduler is the pipeline's unless another one is given.
        """
        if not isinstance(target, cls):
            return cls(target, denoiser_of(target), scheduler)
        return target if scheduler is None else cls(target.target, target.model, scheduler)

    @property
    def pipe(self) -> Any:
        """The pipeline, None for a network alone."""
        return None if isinstance(self.target, nn.Module) else self.target

    @property
    def scheduler(self) -> Any:
        """The scheduler at present; None for a network alone, which is taken for a DiT."""
        return getattr(self.pipe, "scheduler", None) if self.given is None else self.given

    @cached_property
    def backbone(self) -> Backbone:
        """The network as a stack of blocks; raises as :func:`accelkit.backbones.backbone_of`."""
        return backbone_of(self.model)

    @cached_property
    def calls(self) -> Conditioning:
        """How the network is called; raises as :func:`conditioning_of` where it is not known."""
        return conditioning_of(self.backbone)

    @property
    def axis(self) -> NoiseAxis:
        """The noise axis of the scheduler at present."""
        return self.once("axis", lambda: NoiseAxis.of(self.scheduler))

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` returns; it is called again only for another scheduler."""
        scheduler = self.scheduler
        known = self._made.get(name)
        if known is None or known[0] is not scheduler:
            known = self._made[name] = (scheduler, make())
        return known[1]

    def learn(self) -> Subject:
        """Learn from the pipeline how the network is called, if that is not known; return self."""
        try:
            _ = self.calls
        except AccelkitError:
            learn(self.pipe)
        return self
