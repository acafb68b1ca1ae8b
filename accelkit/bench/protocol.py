"""What a bench compares, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelkit.errors import AccelkitError


@dataclass(frozen=True)
class Protocol:
    """What is compared, and how.

    Attributes:
        methods: as :func:`accelkit.bench.methods.parse_methods` reads them; full depth is put first
            if it is not among them.
        samplers: each a name and, behind a colon, the network calls per image.
        images: made of each row, for its quality.
        batch_size: of these; it changes no figure but by rounding, and by caches that decide for a
            batch as a whole.
        seed: of the first image.
        labels: classes to go round, such as ``0-9``; None for all of the data.
        guidance: classifier-free guidance scale.
        guidance_channels: as of :class:`accelkit.sample.generate.Sampling`.
        kernels: as :func:`accelkit.enable` takes it, for full depth too.
        rounds: of timing.
        timing_batch_size: images of a timed call.
        throughput: batch sizes at which the images per second are measured, with the sampler of
            fewest steps.
        features: as :func:`accelkit.metrics.features.open_extractor` takes it; None for that of the
            digits, and no figures of quality for other data.
        features_sha256: what the extractor's file has to have.
        reference: as :func:`accelkit.metrics.references.open_reference` takes it; None for the
            data.

    Raises:
        AccelkitError: a number is too small.
    """

    methods: str
    samplers: tuple[str, ...]
    images: int = 5000
    batch_size: int = 32
    seed: int = 0
    labels: str | None = None
    guidance: float = 1.0
    guidance_channels: int | None = None
    kernels: str = "auto"
    rounds: int = 7
    timing_batch_size: int = 32
    throughput: tuple[int, ...] = (1, 8)
    features: str | None = None
    features_sha256: str | None = None
    reference: str | None = None

    def __post_init__(self) -> None:
        for name in ("images", "batch_size", "rounds", "timing_batch_size"):
            if (value := getattr(self, name)) < 1:
                raise AccelkitError(f"{name.replace('_', ' ')} is at least 1, got {value}")
        if any(size < 1 for size in self.throughput):
            raise AccelkitError(f"a batch holds at least 1 image, got {min(self.throughput)}")
        if not self.samplers:
            raise AccelkitError("no sampler is given; name at least one, such as ddim:50")

    def samplings(self, pipe: Any) -> list[Any]:
        """Return the samplers, :class:`accelkit.sample.generate.Sampling`, as run on ``pipe``.

        Raises:
            AccelkitError: one cannot be read, or does not suit the pipeline.
        """
        from accelkit.sample.generate import Sampling

        found = []
        for text in self.samplers:
            name, _, steps = text.strip().partition(":")
            if not steps.isdecimal() or len(steps) > 9:  # int() refuses thousands of digits
                raise AccelkitError(
                    f"cannot read the sampler {text!r}; give a name and a number of steps, such as "
                    "ddim:50"
                )
            how = Sampling(name, int(steps), self.guidance, self.guidance_channels)
            found.append(how.check(pipe))
        return list(dict.fromkeys(found))
