"""What methods of others are put on, and how they say that they cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from accelkit.backbones import Backbone, backbone_of, denoiser_of
from accelkit.backbones.conditioning import Item, conditioning_of
from accelkit.errors import AccelkitError
from accelkit.sample.generate import Sampling
from accelkit.sample.samplers import sampler_for


class Unavailable(AccelkitError):  # noqa: N818 - no error of the comparison: a row of it
    """A method that is not installed, or cannot run on this model: the reason, one sentence."""


@dataclass(frozen=True)
class Target:
    """What a cache is put on.

    Attributes:
        pipe: a pipeline.
        sampling: how it is going to be sampled from.
        model: its network.
        backbone: its family.
    """

    pipe: Any
    sampling: Sampling
    model: Any = field(init=False)
    backbone: Backbone = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", denoiser_of(self.pipe))
        object.__setattr__(self, "backbone", backbone_of(self.model))

    @property
    def guided(self) -> bool:
        """Whether a call has a second half for guidance."""
        return self.sampling.guidance != 1

    @property
    def calls(self) -> int:
        """How many network calls a run has."""
        how = self.sampling
        return len(sampler_for(self.pipe, how.sampler, how.steps).timesteps)


def cannot_run(title: str, model: nn.Module, error: Exception) -> Unavailable:
    """Return what to raise for a method that an error shows not to run on ``model``."""
    said = " ".join(str(error).split())[:200].rstrip(". ")
    kind = type(error).__name__
    reason = f"{kind}: {said}" if said else kind
    return Unavailable(f"{title} cannot run on this {type(model).__name__} ({reason})")


def some_items(model: nn.Module, count: int) -> list[Item]:
    """Return classes, or empty captions, for runs whose images nobody looks at."""
    backbone = backbone_of(model)
    if conditioning_of(backbone).text:
        return [""] * count
    classes = backbone.num_classes
    return [None if classes is None else index % classes for index in range(count)]
