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
    (:func:`accelkit.sample.samplers.resolved`). A guidance scale of 1 runs no second half of the
    batch. ``guidance_channels`` is None for all latent channels, as in diffusers; the original DiT
    guides the first 3.

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
        """Return the settings with ``auto`` replaced by the sampler's name.

        Raises:
            AccelkitError: the sampler does not follow the pipeline's process, the pipeline calls
                its network differently from accelkit, or the model has fewer channels than are
                guided.
        """
        from accelkit.backbones import backbone_of, denoiser_of
        from accelkit.backbones.conditioning import conditioning_of
        from accelkit.sample.samplers import resolved, sampler_for

        sampler_for(pipe, self.sampler, self.steps)
        calls = conditioning_of(backbone_of(denoiser_of(pipe)))
        calls.suits(pipe)
        channels = calls.shape[0]
        if (self.guidance_channels or 0) > channels:
            raise AccelkitError(
                f"{self.guidance_channels} channels cannot be guided, the model has {channels}"
            )
        return replace(self, sampler=resolved(self.sampler, pipe.scheduler))
