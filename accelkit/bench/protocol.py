"""What a bench compares, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from accelkit.errors import AccelkitError
from accelkit.fields import COUNT, DATA, ESSENTIAL, EVALUATION, check, setting


@dataclass(frozen=True)
class Protocol:
    """What is compared, and how.

    ``methods`` is a text for :func:`accelkit.bench.methods.parse_methods`; full depth is put first
    if it is not among them. ``batch_size`` changes the figures only by rounding, and through caches
    that decide for a batch as a whole. Throughput is measured with the sampler of fewest steps.

    Raises:
        AccelkitError: a number is too small, or there is no sampler.
    """

    methods: str
    samplers: tuple[str, ...] = setting(
        ("auto:50", "auto:10"),
        "Samplers, each with its number of network calls: ddpm:250, ddim:50, dpm:20 "
        "(DPM-Solver++), dpm-fast:20 (single-step), em:1000 (continuous VP SDE), flow:28 (flow "
        "matching), or auto:50 for the deterministic sampler of the model's process",
        EVALUATION,
    )
    images: int = setting(
        5000,
        "Images per row for the quality",
        ESSENTIAL,
        flags="-n --num-images",
        rule=COUNT,
    )
    batch_size: int = setting(
        32,
        "Images generated at once",
        EVALUATION,
        rule=COUNT,
    )
    seed: int = setting(0, "Seed of the first image; the next image has the next seed", EVALUATION)
    labels: str | None = setting(
        None, "Classes to go round, such as 3,1,4 or 0-9; all by default", DATA
    )
    guidance: float = 1.0
    guidance_channels: int | None = None
    kernels: str = setting(
        "auto",
        "Network passes: auto for fused ones where the model's family has them, off for the "
        "model's own modules",
    )
    rounds: int = setting(7, "Timed calls per row and sampler", EVALUATION, rule=COUNT)
    timing_batch_size: int = setting(32, "Images of a timed call", EVALUATION, rule=COUNT)
    throughput: tuple[int, ...] = setting(
        (1, 8), "Batch sizes at which images per second are measured; empty for none", EVALUATION
    )
    features: str | None = setting(
        None,
        "Feature extractor for the quality: digits, torch-fidelity, or a TorchScript file such as "
        "inception-2015-12-05.pt; digits by default for the digits",
        EVALUATION,
    )
    features_sha256: str | None = setting(
        None, "Required SHA-256 of the feature extractor's file", EVALUATION
    )
    reference: str | None = setting(
        None, "Images or .npz statistics to compare with; the data by default", EVALUATION
    )

    def __post_init__(self) -> None:
        check(self)
        if any(size < 1 for size in self.throughput):
            raise AccelkitError(f"a batch holds at least 1 image, got {min(self.throughput)}")
        if not self.samplers:
            raise AccelkitError("no sampler is given; name at least one, such as ddim:50")

    def samplings(self, pipe: Any) -> list[Any]:
        """Return the samplers, :class:`accelkit.sample.generate.Sampling`, as run on ``pipe``.

        Raises:
            AccelkitError: one cannot be read, or does not suit the pipeline.
        """
        from accelkit.sample.sampling import Sampling

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


def listed(text: str) -> list[str]:
    """Return the parts of a list of methods, schedules or samplers.

    A literal schedule holds commas, so a list with one has semicolons. Otherwise commas separate
    the parts, except those between the options of one name.
    """
    between = ";" if "@" in text or ";" in text else r",(?!\s*\w+=)"
    return [part.strip() for part in re.split(between, text) if part.strip()]
