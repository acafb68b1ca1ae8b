"""The methods of a comparison: schedules, methods of other libraries, and combinations of both.

A method is written as parts joined by ``+``, in any order::

    D4                    a schedule, as accelkit.Schedule.parse reads it
    tome:0.3              token merging, at full depth
    first_block_cache     a cache (accelkit.bench.baselines.registry), its options after colons
    compile               torch.compile; compile:BACKEND, or compile:graphs for CUDA graphs
    eager                 the model's own modules, where full depth runs fused kernels
    steps:20              full depth in another number of steps
    steps                 full depth, once per schedule, with steps reduced to its cost
    D4+pab:3+compile      a combination

Full depth and schedules run as :func:`accelkit.enable` runs them, by fused kernels where a model
has them. Caches and torch.compile run the model's own modules; ``eager`` does so too, for
comparison with these. With ``kernels="off"`` all methods do.
"""

from __future__ import annotations

import difflib
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from accelkit.backbones import Backbone
from accelkit.bench.baselines.registry import BASELINES, Value, cached
from accelkit.bench.baselines.trials import Unavailable, cannot_run, some_items
from accelkit.bench.protocol import listed
from accelkit.bench.twins import in_place_of_its_own, twin_of
from accelkit.compute import KNOBS
from accelkit.cost import cost_of, ideal_saving
from accelkit.errors import AccelkitError
from accelkit.preset_names import common_presets, preset_names
from accelkit.runtime import conflicts, graphs
from accelkit.runtime.graphs import GRAPHS
from accelkit.runtime.switch import enable, enabled_on
from accelkit.sample.generate import Sampling, generate_latents
from accelkit.schedule import Schedule
from accelkit.subject import Subject

FEWER = 0
"""The steps of the method ``steps``, which :func:`fewer_steps` replaces."""

_MOST_GRAPHS = 64
"""Most graphs of all methods and batch sizes together. torch.compile would run calls beyond its
limit without a graph, and they would be timed like that."""


@dataclass(frozen=True)
class Method:
    """How images are made: one row of a comparison. Methods are equal whatever their names.

    Attributes:
        name: the method as the user wrote it.
        schedule: the schedule, which includes merging of tokens; full depth if none was named.
        baseline: a key of :data:`accelkit.bench.baselines.registry.BASELINES`, None for no cache.
        options: all options of the baseline.
        compile: ``graphs``, a backend of torch.compile, or None.
        eager: whether the model's own modules run; False with a cache or torch.compile, where
            they always do.
        steps: sampling steps; None for the sampler's own, :data:`FEWER` for ``steps``.
    """

    name: str = field(compare=False)
    schedule: Schedule
    baseline: str | None = None
    options: dict[str, Value] = field(default_factory=dict)
    compile: str | None = None
    eager: bool = False
    steps: int | None = None

    @property
    def kind(self) -> str:
        """``full``, ``schedule``, ``baseline``, or ``combination`` of several."""
        fewer = self.steps is not None
        others = [not self.schedule.plain, self.baseline, self.compile, self.eager, fewer]
        count = sum(map(bool, others))
        if self.schedule.depths[0] < self.schedule.layers:
            return "combination" if count else "schedule"
        return ("full", "baseline", "combination")[min(count, 2)]

    def sampling(self, how: Sampling) -> Sampling:
        """Return the sampling settings of this method, given those of the comparison."""
        return replace(how, steps=self.steps) if self.steps else how


def parse_methods(text: str, target: Any) -> list[Method]:
    """Read methods separated by commas, or by semicolons if one of them is a literal.

    Methods equal to an earlier one are dropped.

    Raises:
        AccelkitError: a part of a method is unknown, or its options cannot be read.
    """
    backbone, methods = Subject.of(target).backbone, list[Method]()
    for name in listed(text):
        if (method := _read(name, backbone)) not in methods:
            methods.append(method)
    return methods


def fewer_steps(
    methods: Sequence[Method], steps: int, target: Any, levels: Sequence[float]
) -> list[Method]:
    """Replace ``steps`` by full depth in as many steps as cost what each of the schedules costs.

    Cost means multiply-accumulates. Schedules with equal numbers of steps share one method; a
    schedule that saves less than half a step adds none.
    """
    subject = Subject.of(target)
    found: list[Method] = []
    for method in methods:
        if method.steps != FEWER:
            found.append(method)
            continue
        for other in methods:
            if other.kind != "schedule":
                continue
            count = max(1, round(steps * (1 - _saving(subject, other.schedule, levels))))
            fewer = replace(method, name=f"steps:{count}", steps=count)
            if count != steps and fewer not in [*methods, *found]:
                found.append(fewer)
    return found


@contextmanager
def applied(
    target: Any, method: Method, sampling: Sampling, kernels: str = "auto"
) -> Iterator[Subject]:
    """Run a pipeline's network by a method while entered, and restore it afterwards.

    torch.compile and CUDA graphs run a copy of the network on the same weights, which replaces the
    network while entered. (The copy for CUDA graphs has parameters of its own, since graphs require
    weights to stay at their addresses.) The copy and its graphs are kept until the network is gone.

    Yields:
        The subject to sample from, whose network may be the copy.

    Raises:
        Unavailable: the method is not installed or cannot run on this network, or its parts cannot
            be combined.
    """
    subject = Subject.of(target)
    with ExitStack() as stack:
        if method.compile is None:
            _put_on(stack, subject, method, sampling, kernels)
            yield subject
            return
        twin = _compiled(subject, method, sampling, kernels)
        stack.enter_context(in_place_of_its_own(subject.pipe, twin))
        if method.compile != GRAPHS:
            limit = {"recompile_limit": _MOST_GRAPHS, "fail_on_recompile_limit_hit": True}
            stack.enter_context(torch._dynamo.config.patch(limit))
        yield replace(subject, model=twin)


def check(target: Any, method: Method, sampling: Sampling, kernels: str = "auto") -> None:
    """Raise Unavailable if a method fails on two images, in at most ten steps.

    Caches do nothing in a run's first steps, and ten steps are more than these. Arguments are those
    of :func:`applied`. An error of full depth or of a schedule alone is raised unchanged.
    """
    brief = replace(sampling, steps=min(sampling.steps, 10))
    with applied(target, method, brief, kernels) as subject:
        try:
            generate_latents(subject, some_items(subject, 2), range(2), brief)
        except AccelkitError:
            raise
        except Exception as error:  # libraries raise anything for a model they do not know
            if method.baseline is None and method.compile is None:
                raise
            raise cannot_run(method.name, subject.model, error) from error
        state = enabled_on(subject)
        if method.compile == GRAPHS and not state.fused.graphs:  # type: ignore[union-attr]
            raise Unavailable(f"no call of {method.name} can be captured as a graph")


def _saving(subject: Subject, schedule: Schedule, levels: Sequence[float]) -> float:
    try:
        return schedule.ideal_saving(levels, cost_of(subject))
    except AccelkitError:  # the cost cannot be counted: use the share of blocks, with a warning
        return ideal_saving(subject, schedule, levels)


_kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[nn.Module, ExitStack]]] = (
    weakref.WeakKeyDictionary()
)


def _compiled(subject: Subject, method: Method, sampling: Sampling, kernels: str) -> nn.Module:
    """Return the compiled copy of a pipeline's network that runs by a method."""
    key = (
        str(method.schedule),
        method.baseline and (method.baseline, *method.options.items(), sampling),
        method.compile,
        method.eager,
        kernels,
    )
    kept = _kept.setdefault(subject.model, {})
    if key not in kept:
        try:
            twin = twin_of(subject.model, shared=method.compile != GRAPHS)
        except AccelkitError as error:
            raise Unavailable(str(error)) from error
        with in_place_of_its_own(subject.pipe, twin), ExitStack() as stack:
            _put_on(stack, replace(subject, model=twin), method, sampling, kernels)
            if method.compile != GRAPHS:
                twin.compile(backend=method.compile, dynamic=False)
            kept[key] = twin, stack.pop_all()  # the schedule and cache stay on the copy
    return kept[key][0]


def _put_on(
    stack: ExitStack, subject: Subject, method: Method, sampling: Sampling, kernels: str
) -> None:
    """Put a method's schedule and cache on a network until ``stack`` is closed."""
    schedule, by_torch = method.schedule, method.compile not in (None, GRAPHS)
    kernels = "off" if by_torch or method.eager else kernels
    try:
        if not schedule.full or not (by_torch or method.baseline):
            stack.enter_context(enable(subject, schedule, kernels=kernels))
        if method.compile == GRAPHS:
            graphs.compile(subject)
        if method.baseline is not None:
            stack.enter_context(cached(subject, sampling, method.baseline, method.options))
            conflicts.check(subject.backbone, schedule)
    except Unavailable:
        raise
    except AccelkitError as error:
        if method.kind in ("full", "schedule"):
            raise
        raise Unavailable(str(error)) from error


def _read(name: str, backbone: Backbone) -> Method:
    """Read one method; parts that are not a cache, compile, eager or steps form the schedule."""
    baseline: str | None = None
    backend: str | None = None
    steps: int | None = None
    options: dict[str, Value] = {}
    schedule: list[str] = []
    eager = False
    for part in name.split("+"):
        head, *rest = part.strip().split(":")
        head = head.lower()
        taken: Value | None = {"compile": backend, "steps": steps}.get(head, baseline)
        if part.strip().lower() == "eager":
            eager = True
        elif head not in (*BASELINES, "compile", "steps"):
            schedule.append(part.strip())
        elif taken is not None:
            raise AccelkitError(f"{name!r} has {taken} and {part}; a method has one of a kind")
        elif head in BASELINES:
            baseline, options = head, BASELINES[head].read(rest)
        elif head == "compile":
            backend = _backend(":".join(rest) or "inductor")
        else:
            steps = _steps(":".join(rest), name)
    eager = eager and baseline is None and backend in (None, GRAPHS)  # the others always are
    parsed = _schedule(schedule, name, backbone)
    return Method(name, parsed, baseline, options, backend, eager, steps)


def _schedule(parts: list[str], name: str, backbone: Backbone) -> Schedule:
    """Read the schedule of a method, with its knobs last as Schedule.parse expects."""
    knobs = {
        word: [p for p in parts if p.lower().startswith(f"{word}:") and "@" not in p]
        for word in KNOBS
    }
    last = [part for given in knobs.values() for part in given]
    whole = [part for part in parts if part not in last]
    plain = [part for part in whole if re.fullmatch(r"[\w-]+(:[^@.]*)?", part)]
    if "@" in name:  # a + may be part of a literal's intervals
        plain = []
    for part in plain:
        _check_name(part, backbone)
    for given in (plain, *knobs.values()):
        if len(given) > 1:
            raise AccelkitError(
                f"{name!r} has both {' and '.join(given)}; a method has one of a kind"
            )
    return Schedule.parse(
        "+".join(["+".join(whole) or "full", *last]), backbone.depth, backbone.family
    )


def _check_name(part: str, backbone: Backbone) -> None:
    presets = (*preset_names(backbone.family), *common_presets())
    known = [*presets, "full", "uniform:K", "tome:RATIO", *BASELINES, "compile", "eager", "steps:K"]
    word = part.partition(":")[0].lower()
    if word not in {name.partition(":")[0].lower() for name in known}:
        raise AccelkitError(f"unknown method {part!r}; nearest first: {_nearest(word, known)}")


def _backend(name: str) -> str:
    known = [GRAPHS, *torch.compiler.list_backends(exclude_tags=())]
    if name not in known:
        raise AccelkitError(
            f"torch.compile has no backend {name!r}; nearest first: {_nearest(name, known)}"
        )
    return name


def _nearest(word: str, known: Iterable[str]) -> str:
    spelled = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), spelled, n=3, cutoff=0)
    return ", ".join(spelled[name] for name in near)


def _steps(text: str, name: str) -> int:
    if not text and name.strip().lower() == "steps":
        return FEWER
    if re.fullmatch(r"0*[1-9]\d{0,8}", text):
        return int(text)
    raise AccelkitError(
        f"cannot read {name!r}: write steps:20 for 20 steps, or steps alone for as many as each of "
        "the schedules costs"
    )
