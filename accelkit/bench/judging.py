"""The quality of a variant's images, made and judged as a stream by any number of processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelkit.bench.harness import OnRun, Variant
from accelkit.bench.methods import applied
from accelkit.metrics.features import FeatureExtractor
from accelkit.metrics.quality import measure
from accelkit.metrics.references import Reference
from accelkit.sample.many import RowShards, Work, World, generate_shards


@dataclass(frozen=True)
class Judge:
    """What images are judged by: a feature extractor, and the features of real images."""

    extractor: FeatureExtractor
    reference: Reference


def judge_variant(
    variant: Variant,
    work: Work,
    batch_size: int,
    kernels: str,
    judge: Judge,
    folder: Path,
    world: World,
    on_images: OnRun = lambda done, total: None,
) -> dict[str, Any] | None:
    """Make a variant's images on all processes; return the row's quality fields on the main one.

    Features are streamed into ``folder``, from where a killed run continues.
    """
    how = replace(work, sampling=variant.method.sampling(work.sampling))
    shards = RowShards(folder)
    with applied(variant.subject, variant.method, how.sampling, kernels) as subject:
        generate_shards(
            subject,
            how,
            batch_size,
            lambda _, images: judge.extractor.extract(images),
            shards,
            world,
            on_images,
        )
    if not world.main:
        return None
    period, missing = len(work.items), judge.extractor.missing
    return measure(shards.batches, judge.reference, period=period, missing=missing)
