"""A comparison of methods over several samplers, which measures nothing twice."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

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
from accelkit.sample.generate import Sampling, generate, grid
from accelkit.sample.many import Work, World
from accelkit.sample.samplers import visited_levels
from accelkit.schedule import Schedule
from accelkit.subject import Subject
from accelkit.version import __version__

_PACKAGES = ("torch", "diffusers", "cache-dit")  # packages that images may depend on
_IN_A_PICTURE = 10  # images in the picture of a row's samples


class Comparison:
    """Measures every method with every sampler.

    All processes make images. The main one also times and judges, and returns the results.
    Measurements are kept in ``folder``; pipelines run no schedule, and those of ``tuned`` have
    weights for theirs.

    Attributes:
        judge: what images are judged by, None to measure no quality.
        first_levels: the noise level of each sampling's first network call, by ``name:steps``.

    Raises:
        AccelkitError: a method or sampler of the plan cannot be read, or does not suit the model.
    """

    def __init__(
        self,
        subject: Subject,
        tuned: Sequence[tuple[Schedule, Subject]],
        plan: Protocol,
        items: tuple[Item, ...],
        folder: Path,
        world: World,
        advance: Callable[[str, int, int], None],
    ) -> None:
        self.subject, self.tuned, self.plan, self.items = subject, list(tuned), plan, items
        self.cells, self.world, self._advance = Cells(folder), world, advance
        self.judge: Judge | None = None
        self.samplings: list[Sampling] = plan.samplings(subject)
        self._works = [Work(plan.images, items, how, plan.seed) for how in self.samplings]
        self._methods = self._all_methods()
        self.first_levels: dict[str, float] = {}
        for work in self._works:  # refuses numbers of steps that the process does not have
            for how in dict.fromkeys(
                v.method.sampling(work.sampling) for v in self._variants(work)
            ):
                levels = visited_levels(subject, how.sampler, how.steps)
                self.first_levels[_worded(how)] = levels[0]
        self._weights = {id(s): fingerprint(s.pipe) for s in (subject, *(s for _, s in tuned))}
        self._machine = machine()
        self._common = {  # what all measurements depend on
            "accelkit": __version__,
            "seed": plan.seed,
            "items": hashlib.sha256(json.dumps(items).encode()).hexdigest(),
            "kernels": plan.kernels,
            "packages": {name: installed(name) for name in _PACKAGES},
        }

    def run(self) -> dict[str, Any]:
        """Return ``rows``, ``depths``, ``throughput`` and ``samples`` of ``results.json``.

        Raises:
            AccelkitError: the disk is full.
        """
        able: list[Run] = []
        skipped: list[tuple[Run, str]] = []
        for work in self._works:
            before = [_key(run) for run in (*able, *(run for run, _ in skipped))]
            for run, reason in self._checked(work, known=before):
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

    # which runs there are

    def _all_methods(self) -> list[Method]:
        """The plan's methods, full depth first, and the schedules that weights were tuned for."""
        methods = parse_methods(self.plan.methods, self.subject)
        if not any(method.kind == "full" for method in methods):
            methods = [*parse_methods("full", self.subject), *methods]
        for schedule, _ in self.tuned:
            alone = Method(schedule.name or str(schedule), schedule)
            methods += [alone] if alone not in methods else []
        named = [replace(m, name="full") if m.kind == "full" else m for m in methods]
        return sorted(named, key=lambda method: method.kind != "full")

    def _variants(self, work: Work) -> list[Variant]:
        how = work.sampling
        levels = visited_levels(self.subject, how.sampler, how.steps)
        methods = fewer_steps(self._methods, how.steps, self.subject, levels)
        variants = [Variant(self.subject, method) for method in methods]
        for schedule, subject in self.tuned:
            of_it = [m for m in methods if schedule in (m.schedule, _depths_of(m.schedule))]
            variants += [Variant(subject, method, tuned=True) for method in of_it]
        return variants

    def _checked(self, work: Work, known: Sequence[tuple[Any, ...]]) -> list[tuple[Run, str]]:
        """Return a sampler's runs, each with the reason why it cannot run, "" if it can.

        The main process decides by what it has installed, so that all processes run the same.
        Runs that are ``known`` already are left out: ``steps`` of one sampler can be a run that is
        listed under another.
        """
        runs = [(variant, work) for variant in self._variants(work)]
        runs = [run for run in runs if _key(run) not in known]
        reasons = [self._reason(*run) for run in runs] if self.world.main else None
        return list(zip(runs, self.world.broadcast(reasons), strict=True))

    def _reason(self, variant: Variant, work: Work) -> str:
        """Return why a variant cannot run on this machine, "" if it can."""
        how = variant.method.sampling(work.sampling)

        def make() -> str:
            try:
                check(variant.subject, variant.method, how, self.plan.kernels)
            except Unavailable as error:
                return str(error)
            return ""

        settings = self._settings([(variant, work)], kind="check", machine=self._machine)
        return self.cells.made(settings, make)

    # measurements, each taken from the cells if it was made before

    def _settings(self, runs: Sequence[Run], **more: Any) -> dict[str, Any]:
        """Everything that a measurement of runs depends on."""
        described = [self._described(variant, work.sampling) for variant, work in runs]
        return {**self._common, "runs": described, **more}

    def _described(self, variant: Variant, of: Sampling) -> dict[str, Any]:
        method, how = variant.method, variant.method.sampling(of)
        return {
            **{name: getattr(method, name) for name in ("baseline", "options", "compile", "eager")},
            "schedule": [method.schedule.layers, method.schedule.to_dict()["intervals"]],
            "sampling": asdict(how),
            "weights": self._weights[id(variant.subject)],
        }

    def _timed(self, kind: str, make: Callable[[], Any], settings: dict[str, Any]) -> Any:
        """Return what the main process timed on this machine; an empty list on others."""
        return self.cells.made(self._here(kind, settings), make) if self.world.main else []

    def _here(self, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "machine": self._machine, **settings}

    def _on(self, task: str) -> Callable[[int, int], None]:
        return lambda done, total: self._advance(task, done, total)

    def _times(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        plan, size = self.plan, self.plan.timing_batch_size
        settings = self._settings(runs, rounds=plan.rounds, batch_size=size)
        given = (runs, size, plan.rounds, plan.kernels)
        kept = self.cells.path(self._here("times", settings)) / "rounds.json"
        made = self._timed(
            "times", lambda: harness.time_runs(*given, kept, self._on("timing")), settings
        )
        return made or [{} for _ in runs]

    def _throughput(self, variants: Sequence[Variant], work: Work) -> list[dict[str, Any]]:
        if not (sizes := self.plan.throughput):
            return []
        settings = self._settings([(v, work) for v in variants], batch_sizes=sizes)
        given = (variants, work, sizes, self.plan.kernels, self._on("throughput"))
        return self._timed("throughput", lambda: harness.throughput(*given), settings)

    def _depths(self, work: Work) -> list[dict[str, Any]]:
        deepest = self.subject.backbone.depth
        depths = sorted({deepest, *(d for m in self._methods for d in m.schedule.depths)})
        size, on_run = self.plan.timing_batch_size, self._on("timing by depth")
        full = (self._variants(work)[0], work)
        settings = self._settings([full], depths=depths, batch_size=size)
        given = (self.subject, depths, work, size, self.plan.kernels, on_run)
        return self._timed("depths", lambda: harness.time_depths(*given), settings)

    def _quality(self, variant: Variant, work: Work) -> dict[str, Any]:
        """Make images on all processes; return the quality fields of a row on the main one."""
        if self.judge is None:
            return {}
        # a cache may decide for a batch as a whole, so that images depend on the batch
        batch = self.plan.batch_size if variant.method.baseline else None
        settings = self._settings(
            [(variant, work)],
            kind="quality",
            images=work.images,
            extractor=[self.judge.extractor.name, self.judge.extractor.sha256],
            reference=self.judge.reference.fingerprint,
            batch_size=batch,
        )
        found = self.world.broadcast(self.cells.get(settings) if self.world.main else None)
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
        """Write a picture of a row's first images; all rows share items and seeds."""
        settings = self._settings([(variant, work)], kind="samples", images=_IN_A_PICTURE)
        named, how = variant.identity(work.sampling), variant.method.sampling(work.sampling)
        path = self.cells.path(settings) / "samples.png"
        file = f"samples/{_slug(named)}.png"

        def make() -> str:
            with applied(variant.subject, variant.method, how, self.plan.kernels) as subject:
                images = generate(subject, *work.part(range(_IN_A_PICTURE)), how)
            with writing(path, AGAIN) as part:
                Image.fromarray(grid(images, columns=_IN_A_PICTURE)).save(part, format="png")
            return sum_of_file(path)

        if self.world.main:
            known = self.cells.get(settings) if path.exists() else None
            if known is None or known not in (
                True,
                sum_of_file(path),
            ):  # older cells hold True in place of a sum
                self.cells.put(settings, make())
            write_bytes(self.cells.folder.parent / file, path.read_bytes(), AGAIN)
        return {**named, "file": file}


def _depths_of(schedule: Schedule) -> Schedule:
    """Return the same depths without knobs."""
    computes = tuple(Compute(compute.depth) for compute in schedule.computes)
    return Schedule(schedule.edges, computes, schedule.layers)


def _slug(named: dict[str, Any]) -> str:
    """Return a row's name as a file name, which is cut if a literal is long."""
    text = "-".join(map(str, identity(named)))
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", text)
    if len(slug) <= 80:
        return slug
    return f"{slug[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _key(run: Run) -> tuple[Any, ...]:
    variant, work = run
    return identity(variant.identity(work.sampling))


def _row(variant: Variant, sampling: Sampling) -> dict[str, Any]:
    """Return a row before anything is measured."""
    method = variant.method
    known = {"kind": method.kind, "schedule": str(method.schedule)}
    return {**blank_row(), **variant.identity(sampling), **known}


def _worded(how: Sampling) -> str:
    return f"{how.sampler}:{how.steps}"
