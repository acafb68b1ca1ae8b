"""The settings by which images are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.fields import EVALUATION, setting


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    ``sampler`` is a key of :data:`accelkit.sample.samplers.SAMPLERS`, or ``auto``
    (:meth:`accelkit.sample.samplers.Samplers.named`). A guidance scale of 1 runs no second half of
    a batch. ``guidance_channels`` is None for all latent channels, as in diffusers; the original
    DiT guides the first 3.

    Raises:
        AccelkitError: a scale that is not finite, or fewer than one guided channel.
    """

    sampler: str = setting(
        "auto",
        "Sampler: ddpm, ddim, dpm (DPM-Solver++), dpm-fast (single-step), em (continuous VP SDE), "
        "flow (flow matching), or auto for flow or ddim by the model's process",
        EVALUATION,
    )
    steps: int = setting(50, "Network calls per image", EVALUATION)
    guidance: float = setting(1.0, "Classifier-free guidance scale; 1 for none", EVALUATION)
    guidance_channels: int | None = setting(
        None,
        "Guided latent channels; 0 for all, 3 for the original DiT",
        EVALUATION,
        zero_is_none=True,
    )

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance):
            raise AccelkitError(f"a guidance scale is a finite number, got {self.guidance}")
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise AccelkitError(f"guide at least 1 channel, got {self.guidance_channels}")

    def check(self, pipe: Any) -> Sampling:
        """Return these settings for a pipeline, with the sampler's name in place of ``auto``.

        Args:
            pipe: a pipeline or its subject.

        Raises:
            AccelkitError: the sampler does not follow the pipeline's process, accelkit does not
                know how the pipeline calls its network, or fewer channels exist than are guided.
        """
        from accelkit.sample.samplers import sampler_for, samplers_of
        from accelkit.subject import Subject

        subject = Subject.of(pipe)
        sampler_for(subject, self.sampler, self.steps)
        subject.calls.suits(subject.pipe)
        channels = subject.calls.shape[0]
        if (self.guidance_channels or 0) > channels:
            raise AccelkitError(
                f"{self.guidance_channels} channels cannot be guided, the model has {channels}"
            )
        return replace(self, sampler=samplers_of(subject).named(self.sampler))

    def calls(self, pipe: Any) -> int:
        """Return how many timesteps a run on ``pipe`` visits."""
        from accelkit.sample.samplers import sampler_for

        return len(sampler_for(pipe, self.sampler, self.steps).timesteps)
