"""Times and scores variants of one pipeline, interleaved in one run on the same work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.conditioning import Item
from accelkit.cost import ideal_saving
from accelkit.errors import AccelkitError
from accelkit.metrics.features import FeatureExtractor
from accelkit.metrics.frechet import Moments, frechet_distance
from accelkit.noise import NoiseAxis
from accelkit.sample.generate import Sampling, check_seed, generate
from accelkit.sample.samplers import make_sampler
from accelkit.schedule import Schedule
from accelkit.switch import enable


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: a pipeline without a schedule, and the schedule to run it with."""

    pipe: Any
    schedule: Schedule
    tuned: bool = False

    @property
    def full(self) -> bool:
        """Whether all is spent at every noise level."""
        return self.schedule.full


@dataclass(frozen=True)
class Work:
    """What every variant does: ``images`` images in batches, with a seed and an item each.

    ``classes`` are the items to go round, classes or captions, or None alone for neither;
    ``kernels`` is as :func:`accelkit.enable` takes it, for full depth too.
    """

    images: int
    batch_size: int
    sampling: Sampling
    classes: tuple[Item, ...]
    seed: int = 0
    kernels: str = "auto"

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch_size < 1:
            raise AccelkitError(
                f"give at least 1 image and a batch of at least 1, got {self.images} images in "
                f"batches of {self.batch_size}"
            )

        check_seed(self.seed)

    def batches(self) -> Iterator[tuple[list[Item], list[int]]]:
        """Yield items, going round the classes, and consecutive seeds."""
        for start in range(0, self.images, self.batch_size):
            places = range(start, min(start + self.batch_size, self.images))
            labels = [self.classes[i % len(self.classes)] for i in places]
            yield labels, [self.seed + i for i in places]


@dataclass
class Score:
    """What one variant took and made."""

    seconds: list[float] = field(default_factory=list)
    moments: Moments | None = None


def compare(
    variants: list[Variant],
    work: Work,
    features: FeatureExtractor | None = None,
    reference: Moments | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Run ``work`` with every variant and return a row for each.

    Batches are interleaved, A B C A B C, so that a drift of the machine's speed hits all alike; the
    saving is the median over batches of 1 - seconds / seconds of the first full-depth variant. The
    time is that of a whole call, noise to bytes. All variants get the same labels and seeds.

    Args:
        variants: at least one; savings are null unless one runs at full depth.
        work: how many images, and how.
        features: the extractor for the Fréchet distance, None for no quality figure.
        reference: the real images' statistics in the same features.
        on_batch: called with the batches done and their total over all variants.

    Returns:
        Rows of plain data: schedule, spelled, tuned, fid (null without features), seconds (median
        of a full batch), seconds_quartiles, saving, ideal_saving, mean_depth, images.
    """
    scores = [Score(moments=Moments() if features else None) for _ in variants]
    batches = list(work.batches())
    for variant in variants:
        labels, seeds = batches[0]
        _run(variant, labels[:2], seeds[:2], replace(work, sampling=_brief(work.sampling)))
    for index, (labels, seeds) in enumerate(batches):
        for place, (variant, score) in enumerate(zip(variants, scores, strict=True)):
            images, seconds = _run(variant, labels, seeds, work)
            score.seconds.append(seconds)
            if features is not None and score.moments is not None:
                score.moments.update(features(images))
            on_batch(index * len(variants) + place + 1, len(batches) * len(variants))
    baseline = next((s for v, s in zip(variants, scores, strict=True) if v.full), None)
    # a shorter last batch counts in ratios but not in the seconds of a batch
    whole = [i for i, (labels, _) in enumerate(batches) if len(labels) == work.batch_size]
    return [
        _row(variant, score, baseline, work, reference, whole or [0])
        for variant, score in zip(variants, scores, strict=True)
    ]


def reference_moments(images: Iterator[np.ndarray], features: FeatureExtractor) -> Moments:
    """Return the statistics of real images, uint8 batches (n, H, W, 3)."""
    moments = Moments()
    for batch in images:
        moments.update(features(batch))
    return moments


def _brief(sampling: Sampling) -> Sampling:
    """Two steps, enough to warm up."""
    return Sampling(sampling.sampler, 2, sampling.guidance, sampling.guidance_channels)


def _run(
    variant: Variant, labels: list[Item], seeds: list[int], work: Work
) -> tuple[np.ndarray, float]:
    with enable(variant.pipe, variant.schedule, kernels=work.kernels):
        began = time.perf_counter()
        images = generate(variant.pipe, labels, seeds, work.sampling)  # on the CPU, hence finished
        return images, time.perf_counter() - began


def _row(
    variant: Variant,
    score: Score,
    baseline: Score | None,
    work: Work,
    reference: Moments | None,
    whole: list[int],
) -> dict[str, Any]:
    schedule = variant.schedule
    sampler = make_sampler(work.sampling.sampler, variant.pipe.scheduler, work.sampling.steps)
    levels = NoiseAxis.of(sampler).levels(sampler.timesteps)
    seconds = np.array([score.seconds[i] for i in whole])
    saving = None
    if baseline is not None:
        saving = float(1 - np.median(np.array(score.seconds) / np.array(baseline.seconds)))
    fid = None
    if score.moments is not None and reference is not None and score.moments.n > 1:
        fid = frechet_distance(score.moments.mean, score.moments.cov, reference.mean, reference.cov)
    return {
        "schedule": schedule.name or str(schedule),
        "spelled": str(schedule),
        "tuned": variant.tuned,
        "fid": fid,
        "seconds": float(np.median(seconds)),
        "seconds_quartiles": [float(q) for q in np.quantile(seconds, (0.25, 0.75))],
        "saving": saving,
        "ideal_saving": ideal_saving(denoiser_of(variant.pipe), schedule, levels),
        "mean_depth": schedule.mean_depth(levels),
        "layers": backbone_of(denoiser_of(variant.pipe)).depth,
        "images": work.images,
    }
