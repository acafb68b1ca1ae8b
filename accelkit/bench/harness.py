"""Measures the time, throughput and cost of variants of a pipeline, interleaved in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accelkit.bench.methods import Method, applied
from accelkit.bench.timing import Energy, Peak, Stopwatch, median_ratio
from accelkit.cost import cost_of, ideal_saving
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.files.writing import AGAIN, read_record, write_record
from accelkit.runtime.switch import enable
from accelkit.sample.generate import Sampling, decode, generate_latents
from accelkit.sample.many import Work
from accelkit.sample.samplers import sampler_for, visited_levels
from accelkit.schedule import Schedule
from accelkit.subject import Subject

DEPTH_ROUNDS = 10
THROUGHPUT_ROUNDS = 3

OnRun = Callable[[int, int], None]


@dataclass(frozen=True)
class Variant:
    """The pipeline and the method of a row.

    Attributes:
        subject: the pipeline, without a schedule.
        method: how it runs.
        tuned: whether its weights are tuned for the method's schedule.
    """

    subject: Subject
    method: Method
    tuned: bool = False

    @property
    def base(self) -> bool:
        """Whether the others are measured against this variant."""
        return self.method.kind == "full" and not self.tuned

    @property
    def title(self) -> str:
        """The variant's name in progress messages."""
        return self.method.name + (" tuned" if self.tuned else "")

    def identity(self, of: Sampling) -> dict[str, Any]:
        """Return the fields that identify its row, given the comparison's sampling settings."""
        return {
            "method": self.method.name,
            "weights": "tuned" if self.tuned else "original",
            "sampler": of.sampler,
            "steps": self.method.sampling(of).steps,
        }


@torch.no_grad()
def run(variant: Variant, work: Work, size: int, kernels: str, cold: bool) -> dict[str, Any]:
    """Make the first ``size`` images; return seconds, peak memory and energy of the whole call.

    Unless ``cold``, a call of two steps goes first: a user puts a method on only once, so the cost
    of the first call after that does not belong to every run.
    """
    how = variant.method.sampling(work.sampling)
    items, seeds = work.part(range(size))
    with applied(variant.subject, variant.method, how, kernels) as subject:
        if not cold:
            generate_latents(subject, items, seeds, replace(how, steps=min(2, how.steps)))
        device = subject.model.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        watch, peak, energy = Stopwatch(device), Peak(device), Energy(device)
        watch.mark()
        latents = generate_latents(subject, items, seeds, how)
        watch.mark()
        decode(subject, latents)
        watch.mark()
        denoiser, decoder = watch.parts()
        return {
            "seconds": denoiser + decoder,
            "denoiser_seconds": denoiser,
            "peak_memory_bytes": peak.bytes(),
            "energy_joules": energy.joules(),
        }


def _run_if_there_is_room(*arguments: Any) -> dict[str, Any] | None:
    """Return the result of :func:`run`, None if the GPU has too little memory."""
    try:
        return run(*arguments)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


Run = tuple[Variant, Work]
"""What is timed: a variant, and the images that it makes."""


def time_runs(
    runs: Sequence[Run],
    size: int,
    rounds: int,
    kernels: str,
    kept: Path | None = None,
    on_run: OnRun = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Time whole calls of ``size`` images, from noise to bytes; return each row's time fields.

    Rounds are interleaved, A B C A B C, over all samplers, so that a drift of the machine's speed
    affects all alike; rounds that the JSON file ``kept`` holds are not run again. A first round
    warms up and gives the seconds of the first call. The saving is 1 minus the median ratio of a
    round's time to that of the base of the same work, and null if there is no base. A row that does
    not fit the GPU's memory has the field ``skipped`` only.
    """
    found = _read_rounds(kept)
    resumed = len(found)
    for index in range(resumed, rounds + 1):
        if index and index == resumed:  # this process has not warmed up yet
            for variant, work in runs:
                _run_if_there_is_room(variant, work, size, kernels, True)
        row = []
        for place, (variant, work) in enumerate(runs):
            row.append(_run_if_there_is_room(variant, work, size, kernels, index == 0))
            on_run(index * len(runs) + place + 1, (rounds + 1) * len(runs))
        found.append(row)
        if kept is not None:
            write_record(kept, {"rounds": found}, AGAIN)
    bases = {work: place for place, (variant, work) in enumerate(runs) if variant.base}
    no_room = {"skipped": f"there is no room for {size} images at a time in the GPU's memory"}
    by_run = [_whole(column) for column in zip(*found, strict=True)]
    return [
        no_room
        if measured is None
        else _times(measured, by_run[bases[work]] if work in bases else None)
        for measured, (_, work) in zip(by_run, runs, strict=True)
    ]


def _whole(runs: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]] | None:
    """Return a row's rounds, None if one of them did not fit the memory."""
    made = [run for run in runs if run is not None]
    return made if len(made) == len(runs) else None


def _read_rounds(kept: Path | None) -> list[list[dict[str, Any] | None]]:
    """Return the rounds that a file holds; warn and return none if the file is damaged."""
    if kept is None or not kept.exists():
        return []
    try:
        return read_record(kept)["rounds"]
    except (AccelkitError, KeyError, TypeError) as error:
        warnings.warn(f"cannot use {kept} ({error}); timing again", AccelkitWarning, stacklevel=3)
        return []


def _times(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    def of(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
        return [row[name] for row in rows[1:]]

    ratio, interval = (None, None)
    if base is not None:
        ratio, interval = median_ratio(of(runs, "seconds"), of(base, "seconds"))
    peaks, joules = of(runs, "peak_memory_bytes"), of(runs, "energy_joules")
    return {
        **_spread(of(runs, "seconds")),
        "saving": None if ratio is None else 1 - ratio,
        "saving_interval": None if interval is None else [1 - interval[1], 1 - interval[0]],
        "denoiser_seconds": float(np.median(of(runs, "denoiser_seconds"))),
        "first_call_seconds": runs[0]["seconds"],
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "energy_joules": None if None in joules else float(np.median(joules)),
    }


def _spread(seconds: list[float]) -> dict[str, Any]:
    quartiles = [float(q) for q in np.quantile(seconds, (0.25, 0.75))]
    return {"seconds": float(np.median(seconds)), "seconds_quartiles": quartiles}


def throughput(
    variants: Sequence[Variant],
    work: Work,
    sizes: Sequence[int],
    kernels: str,
    on_run: OnRun,
) -> list[dict[str, Any]]:
    """Return the images per second of each variant at each batch size, variant by variant.

    Batch sizes that do not fit the GPU's memory are left out.
    """
    runs = [(variant, work) for variant in variants]
    timed = []
    for place, size in enumerate(sizes):
        of_size = len(runs) * (THROUGHPUT_ROUNDS + 1)

        def note(done: int, _: int, before: int = place * of_size, all_: int = of_size) -> None:
            on_run(before + done, all_ * len(sizes))

        times = time_runs(runs, size, THROUGHPUT_ROUNDS, kernels, on_run=note)
        timed.append(times)
    return [
        {
            **variant.identity(work.sampling),
            "batch_size": size,
            "images_per_second": size / times[place]["seconds"],
        }
        for place, variant in enumerate(variants)
        for size, times in zip(sizes, timed, strict=True)
        if "skipped" not in times[place]
    ]


@torch.no_grad()
def time_depths(
    subject: Subject,
    depths: Sequence[int],
    work: Work,
    size: int,
    kernels: str,
    on_run: OnRun,
) -> list[dict[str, Any]]:
    """Return the time of one network call on ``size`` samples at each depth, interleaved."""
    model, backbone, calls = subject.model, subject.backbone, subject.calls
    sampler = sampler_for(subject, work.sampling.sampler, work.sampling.steps)
    latents = torch.randn(size, *calls.shape, generator=torch.Generator().manual_seed(0))
    latents = latents.to(model.device, model.dtype)
    timestep = sampler.timesteps[len(sampler.timesteps) // 2].expand(size).to(model.device)
    items, _ = work.part(range(size))
    arguments = calls.arguments(latents, timestep, calls.encode(subject.pipe, items))
    watch = Stopwatch(model.device)
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    for done in range(DEPTH_ROUNDS * len(depths)):
        depth = depths[done % len(depths)]
        with enable(subject, Schedule.uniform(depth, backbone.depth), kernels=kernels):
            model(**arguments, return_dict=False)  # a first call also builds what later calls reuse
            watch.mark()
            model(**arguments, return_dict=False)
            watch.mark()
            seconds[depth] += watch.parts()
        on_run(done + 1, DEPTH_ROUNDS * len(depths))
    return [
        {
            "depth": depth,
            **_spread(seconds[depth]),
            "macs": _counted(subject, Schedule.uniform(depth, backbone.depth), None),
            "batch_size": size,
        }
        for depth in depths
    ]


def cost(variant: Variant, sampling: Sampling) -> dict[str, Any]:
    """Return the cost fields of a row: ideal saving, multiply-accumulates and mean depth.

    The fields are null for a cache, whose cost depends on the images.
    """
    subject, schedule = variant.subject, variant.method.schedule
    how = variant.method.sampling(sampling)
    levels = visited_levels(subject, how.sampler, how.steps)
    known = variant.method.baseline is None
    kept = (1 - ideal_saving(subject, schedule, levels)) * how.steps / sampling.steps
    calls = how.steps * (1 + (how.guidance != 1))
    macs = _counted(subject, schedule, levels) if known else None
    return {
        "ideal_saving": 1 - kept if known else None,
        "macs_per_image": None if macs is None else round(macs * calls),
        "mean_depth": schedule.mean_depth(levels) if known else None,
        "layers": schedule.layers,
    }


def _counted(subject: Subject, schedule: Schedule, levels: Any) -> float | None:
    try:
        return schedule.mean(cost_of(subject), levels)
    except AccelkitError:  # some networks cannot be called without their weights
        return None
