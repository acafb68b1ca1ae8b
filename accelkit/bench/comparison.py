"""A comparison of methods over several samplers: what is measured, and what was before."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.conditioning import Item
from accelkit.bench import harness
from accelkit.bench.cells import Cells
from accelkit.bench.harness import Run, Variant
from accelkit.bench.judging import Judge, judge_variant
from accelkit.bench.methods import Method, Unavailable, applied, check, fewer_steps, parse_methods
from accelkit.bench.protocol import Protocol
from accelkit.bench.results import blank_row, identity, installed, machine
from accelkit.compute import Compute
from accelkit.data.shards import fingerprint
from accelkit.files.writing import AGAIN, sum_of_file, write_bytes, writing
from accelkit.noise.axis import NoiseAxis
from accelkit.sample.generate import Sampling, generate, grid
from accelkit.sample.many import Work, World
from accelkit.sample.samplers import sampler_for
from accelkit.schedule import Schedule
from accelkit.version import __version__

_PACKAGES = ("torch", "diffusers", "cache-dit")  # what images may depend on
_IN_A_PICTURE = 10  # images of a row's samples


class Comparison:
    """Measures every method with every sampler, one cell after another.

    All processes make images; the main one times and judges, and returns the results.

    Args:
        pipe: a pipeline without a schedule, with its own weights.
        tuned: schedules, and pipelines with weights tuned for each.
        plan: what and how.
        items: classes or captions to make images of in turn.
        folder: where what was measured is kept.
        world: the processes.
        advance: told the task, how much of it is done, and of how much.

    Attributes:
        judge: what images are judged by, None for no figures of quality.
        first_levels: the noise level of each sampling's first network call, by ``name:steps``.

    Raises:
        AccelkitError: a method or sampler of the plan cannot be read, or does not suit the model.
    """

    def __init__(
        self,
        pipe: Any,
        tuned: Sequence[tuple[Schedule, Any]],
        plan: Protocol,
        items: tuple[Item, ...],
        folder: Path,
        world: World,
        advance: Callable[[str, int, int], None],
    ) -> None:
        self.pipe, self.tuned, self.plan, self.items = pipe, list(tuned), plan, items
        self.cells, self.world, self._advance = Cells(folder), world, advance
        self.judge: Judge | None = None
        self.samplings: list[Sampling] = plan.samplings(pipe)
        self._works = [Work(plan.images, items, how, plan.seed) for how in self.samplings]
        self._methods = self._all_methods()
        self.first_levels: dict[str, float] = {}
        for work in self._works:  # whose steps the process may not have
            for how in dict.fromkeys(v.sampling(work.sampling) for v in self._variants(work)):
                sampler = sampler_for(pipe, how.sampler, how.steps)
                first = NoiseAxis.of(sampler).level(float(sampler.timesteps[0]))
                self.first_levels[_worded(how)] = first
        self._weights = {id(p): fingerprint(p) for p in (pipe, *(p for _, p in tuned))}
        self._machine = machine()
        self._common = {  # what all measurements depend on
            "accelkit": __version__,
            "seed": plan.seed,
            "items": hashlib.sha256(json.dumps(items).encode()).hexdigest(),
            "kernels": plan.kernels,
            "packages": {name: installed(name) for name in _PACKAGES},
        }

    def run(self) -> dict[str, Any]:
        """Return ``rows``, ``depths``, ``throughput`` and ``samples`` as the results have them.

        Raises:
            AccelkitError: the disk is full.
        """
        able: list[Run] = []
        skipped: list[tuple[Run, str]] = []
        for work in self._works:
            before = [_key(run) for run in (*able, *(run for run, _ in skipped))]
            for run, reason in self._told(work, but=before):
                if reason:
                    skipped.append((run, reason))
                else:
                    able.append(run)
        times = self._times(able)
        fewest = min(self._works, key=lambda work: work.sampling.steps)
        throughput = self._throughput([v for v, work in able if work is fewest], fewest)
        depths = self._depths(self._works[0])
        rows, samples = [], []
        for (variant, work), time in zip(able, times, strict=True):
            if "skipped" in time:
                skipped.append(((variant, work), time["skipped"]))
                continue
            costs, quality = harness.cost(variant, work.sampling), self._quality(variant, work)
            rows.append({**_row(variant, work.sampling), **costs, **time, **quality})
            samples.append(self._samples(variant, work))
        rows += [{**_row(v, work.sampling), "skipped": why} for (v, work), why in skipped]
        return {"rows": rows, "depths": depths, "throughput": throughput, "samples": samples}

    # what there is to measure

    def _all_methods(self) -> list[Method]:
        """The plan's methods, full depth first, and the schedules that weights were tuned for."""
        model = denoiser_of(self.pipe)
        methods = parse_methods(self.plan.methods, model)
        if not any(method.kind == "full" for method in methods):
            methods = [*parse_methods("full", model), *methods]
        for schedule, _ in self.tuned:
            alone = Method(schedule.name or str(schedule), schedule)
            methods += [alone] if alone not in methods else []
        named = [replace(m, name="full") if m.kind == "full" else m for m in methods]
        return sorted(named, key=lambda method: method.kind != "full")

    def _variants(self, work: Work) -> list[Variant]:
        how = work.sampling
        sampler = sampler_for(self.pipe, how.sampler, how.steps)
        levels = NoiseAxis.of(sampler).levels(sampler.timesteps)
        methods = fewer_steps(self._methods, how.steps, denoiser_of(self.pipe), levels)
        variants = [Variant(self.pipe, method) for method in methods]
        for schedule, pipe in self.tuned:
            of_it = [m for m in methods if schedule in (m.schedule, _unmerged(m.schedule))]
            variants += [Variant(pipe, method, tuned=True) for method in of_it]
        return variants

    def _told(self, work: Work, but: Sequence[tuple[Any, ...]]) -> list[tuple[Run, str]]:
        """Return what is to be run of a sampler, each with why it cannot, "" if it can.

        The main process finds out: what is installed there holds for all, or they would not meet.
        ``but`` are left out: fewer steps of one sampler may be those of another.
        """
        runs = [(variant, work) for variant in self._variants(work)]
        runs = [run for run in runs if _key(run) not in but]
        reasons = [self._reason(*run) for run in runs] if self.world.main else None
        return list(zip(runs, self.world.told(reasons), strict=True))

    def _reason(self, variant: Variant, work: Work) -> str:
        """Return why a variant cannot run with what is installed here, "" if it can."""
        how = variant.sampling(work.sampling)

        def make() -> str:
            try:
                check(variant.pipe, variant.method, how, self.plan.kernels)
            except Unavailable as error:
                return str(error)
            return ""

        settings = self._settings([(variant, work)], kind="check", machine=self._machine)
        return self.cells.made(settings, make)

    # what is measured, unless it was

    def _settings(self, runs: Sequence[Run], **more: Any) -> dict[str, Any]:
        """What a measurement of runs depends on."""
        described = [self._described(variant, work.sampling) for variant, work in runs]
        return {**self._common, "runs": described, **more}

    def _described(self, variant: Variant, of: Sampling) -> dict[str, Any]:
        method, how = variant.method, variant.sampling(of)
        return {
            **{name: getattr(method, name) for name in ("baseline", "options", "compile", "eager")},
            "schedule": [method.schedule.layers, method.schedule.to_dict()["intervals"]],
            "sampling": asdict(how),
            "weights": self._weights[id(variant.pipe)],
        }

    def _timed(self, kind: str, make: Callable[[], Any], settings: dict[str, Any]) -> Any:
        """Return what the main process timed, on this machine."""
        return self.cells.made(self._here(kind, settings), make) if self.world.main else []

    def _here(self, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "machine": self._machine, **settings}

    def _on(self, task: str) -> Callable[[int, int], None]:
        return lambda done, total: self._advance(task, done, total)

    def _times(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        plan, size = self.plan, self.plan.timing_batch_size
        settings = self._settings(runs, rounds=plan.rounds, batch_size=size)

        def make() -> list[dict[str, Any]]:
            kept = self.cells.path(self._here("times", settings)) / "rounds.json"
            on_run = self._on("timing")
            return harness.time_runs(runs, size, plan.rounds, plan.kernels, kept, on_run)

        return self._timed("times", make, settings) or [{} for _ in runs]

    def _throughput(self, variants: Sequence[Variant], work: Work) -> list[dict[str, Any]]:
        sizes = self.plan.throughput

        def make() -> list[dict[str, Any]]:
            on_run = self._on("throughput")
            return harness.throughput(variants, work, sizes, self.plan.kernels, on_run)

        settings = self._settings([(v, work) for v in variants], batch_sizes=sizes)
        return self._timed("throughput", make, settings) if sizes else []

    def _depths(self, work: Work) -> list[dict[str, Any]]:
        deepest = backbone_of(denoiser_of(self.pipe)).depth
        depths = sorted({deepest, *(d for m in self._methods for d in m.schedule.depths)})
        size = self.plan.timing_batch_size

        def make() -> list[dict[str, Any]]:
            on_run = self._on("timing by depth")
            return harness.time_depths(self.pipe, depths, work, size, self.plan.kernels, on_run)

        full = (self._variants(work)[0], work)
        settings = self._settings([full], depths=depths, batch_size=size)
        return self._timed("depths", make, settings)

    def _quality(self, variant: Variant, work: Work) -> dict[str, Any]:
        """Make images with all processes; return the quality's fields of a row on the main one."""
        if self.judge is None:
            return {}
        # a cache may decide for a batch as a whole, so that its images depend on what is in it
        batch = self.plan.batch_size if variant.method.baseline else None
        settings = self._settings(
            [(variant, work)],
            kind="quality",
            images=work.images,
            extractor=[self.judge.extractor.name, self.judge.extractor.sha256],
            reference=self.judge.reference.fingerprint,
            batch_size=batch,
        )
        found = self.world.told(self.cells.get(settings) if self.world.main else None)
        if found is not None:
            return found
        found = judge_variant(
            variant,
            work,
            self.plan.batch_size,
            self.plan.kernels,
            self.judge,
            self.cells.path(settings) / "features",
            self.world,
            self._on(f"{variant.title} {_worded(work.sampling)}"),
        )
        if found is None:
            return {}
        self.cells.put(settings, found)
        return found

    def _samples(self, variant: Variant, work: Work) -> dict[str, Any]:
        """Leave a row's first images as a picture, the same items and seeds for all rows."""
        settings = self._settings([(variant, work)], kind="samples", images=_IN_A_PICTURE)
        named, how = variant.identity(work.sampling), variant.sampling(work.sampling)
        path = self.cells.path(settings) / "samples.png"
        file = f"samples/{_slug(named)}.png"

        def make() -> str:
            with applied(variant.pipe, variant.method, how, self.plan.kernels):
                images = generate(variant.pipe, *work.part(range(_IN_A_PICTURE)), how)
            with writing(path, AGAIN) as part:
                Image.fromarray(grid(images, columns=_IN_A_PICTURE)).save(part, format="png")
            return sum_of_file(path)

        if self.world.main:
            known = self.cells.get(settings) if path.exists() else None
            if known is None or known not in (True, sum_of_file(path)):  # True: it was not recorded
                self.cells.put(settings, make())
            write_bytes(self.cells.folder.parent / file, path.read_bytes(), AGAIN)
        return {**named, "file": file}


def _unmerged(schedule: Schedule) -> Schedule:
    """The same depths, no tokens merged."""
    computes = tuple(Compute(compute.depth) for compute in schedule.computes)
    return Schedule(schedule.edges, computes, schedule.layers)


def _slug(named: dict[str, Any]) -> str:
    """A row's name as one of a file, that of a long literal cut."""
    text = "-".join(map(str, identity(named)))
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", text)
    if len(slug) <= 80:
        return slug
    return f"{slug[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _key(run: Run) -> tuple[Any, ...]:
    variant, work = run
    return identity(variant.identity(work.sampling))


def _row(variant: Variant, sampling: Sampling) -> dict[str, Any]:
    """What is known of a row before anything is measured."""
    method = variant.method
    known = {"kind": method.kind, "schedule": str(method.schedule)}
    return {**blank_row(), **variant.identity(sampling), **known}


def _worded(how: Sampling) -> str:
    return f"{how.sampler}:{how.steps}"
