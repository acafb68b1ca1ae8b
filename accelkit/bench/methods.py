"""What a comparison runs beside full depth: schedules, other people's methods, and both at once.

A method is spelled in parts between ``+``, in any order::

    D4                    a schedule, as accelkit.Schedule.parse reads it
    tome:0.3              token merging, at full depth
    first_block_cache     a cache (accelkit.bench.baselines.registry), its options behind colons
    compile               torch.compile; compile:BACKEND, or compile:graphs for CUDA graphs
    eager                 the model's own modules, where full depth runs fused kernels
    steps:20              full depth in another number of steps
    steps                 full depth in as many steps as cost what each of the schedules does
    D4+pab:3+compile      and so on

Full depth and schedules run as :func:`accelkit.enable` runs them, by fused kernels where there are
some; caches and torch.compile run the model's own modules, and so does ``eager``, which is what
they compare with. With ``kernels="off"`` all do.
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

from accelkit.backbones import Backbone, backbone_of, denoiser_of
from accelkit.bench.baselines.registry import BASELINES, Value, cached
from accelkit.bench.baselines.target import Target, Unavailable, cannot_run, some_items
from accelkit.bench.twins import in_place_of_its_own, twin_of
from accelkit.cost import cost_of, ideal_saving
from accelkit.errors import AccelkitError
from accelkit.preset_names import common_presets, preset_names
from accelkit.runtime import conflicts, graphs
from accelkit.runtime.graphs import GRAPHS
from accelkit.runtime.switch import enable, enabled_on
from accelkit.sample.generate import Sampling, generate_latents
from accelkit.schedule import Schedule

FEWER = 0
"""The steps of the method ``steps``, which :func:`fewer_steps` replaces."""

_MOST_GRAPHS = 64
"""Of all methods and sizes of batch. Beyond them torch.compile would run, and be timed, without."""


@dataclass(frozen=True)
class Method:
    """How images are made, one row of a comparison. The name takes no part in comparing two.

    Attributes:
        name: as it was asked for.
        schedule: full depth where none was named; merging of tokens is part of it.
        baseline: a key of :data:`accelkit.bench.baselines.registry.BASELINES`, None for no cache.
        options: all options of the baseline.
        compile: ``graphs`` or a backend of torch.compile's, None for neither.
        eager: whether it runs the model's own modules; False where a cache or torch.compile does.
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
        beside = [self.schedule.merges, self.baseline, self.compile, self.eager, fewer]
        count = sum(map(bool, beside))
        if self.schedule.depths[0] < self.schedule.layers:
            return "combination" if count else "schedule"
        return ("full", "baseline", "combination")[min(count, 2)]

    def sampling(self, how: Sampling) -> Sampling:
        """Return how it is sampled, given how all others are."""
        return replace(how, steps=self.steps) if self.steps else how


def parse_methods(text: str, model: nn.Module) -> list[Method]:
    """Read methods for ``model``: commas between them, semicolons if a literal is among them.

    What does the same as one before it is left out.

    Raises:
        AccelkitError: a part of a method is unknown, or its options cannot be read.
    """
    between = ";" if "@" in text or ";" in text else r",(?!\s*\w+=)"
    names = [name.strip() for name in re.split(between, text) if name.strip()]
    backbone, methods = backbone_of(model), list[Method]()
    for name in names:
        if (method := _read(name, backbone)) not in methods:
            methods.append(method)
    return methods


def fewer_steps(
    methods: Sequence[Method], steps: int, model: nn.Module, levels: Sequence[float]
) -> list[Method]:
    """Replace ``steps`` by full depth in as many steps as cost what each of the schedules does.

    The cost is that of multiply-accumulates. Equal numbers are one method, and a schedule that
    saves less than half a step has none.

    Args:
        methods: all of a comparison.
        steps: of the sampler.
        model: the network.
        levels: the noise levels that the sampler visits.
    """
    found: list[Method] = []
    for method in methods:
        if method.steps != FEWER:
            found.append(method)
            continue
        for other in methods:
            if other.kind != "schedule":
                continue
            count = max(1, round(steps * (1 - _saving(model, other.schedule, levels))))
            fewer = replace(method, name=f"steps:{count}", steps=count)
            if count != steps and fewer not in [*methods, *found]:
                found.append(fewer)
    return found


@contextmanager
def applied(pipe: Any, method: Method, sampling: Sampling, kernels: str = "auto") -> Iterator[None]:
    """Run a pipeline's network by a method while entered; afterwards it is what it was.

    What is compiled is a copy on the same weights (of its own for CUDA graphs, which ask for them
    to stay where they are), in place of the pipeline's own network while entered. It is kept until
    that network is gone, so that graphs are made but once.

    Args:
        pipe: a pipeline whose network runs no schedule.
        method: how to run it.
        sampling: how it is sampled from: :meth:`Method.sampling`. Caches are told of it.
        kernels: as :func:`accelkit.enable` takes it.

    Raises:
        Unavailable: the method is not installed, cannot run on this network, or its parts not with
            each other.
    """
    with ExitStack() as stack:
        if method.compile is None:
            _put_on(stack, pipe, method, sampling, kernels)
            yield
            return
        stack.enter_context(in_place_of_its_own(pipe, _compiled(pipe, method, sampling, kernels)))
        if method.compile != GRAPHS:
            limit = {"recompile_limit": _MOST_GRAPHS, "fail_on_recompile_limit_hit": True}
            stack.enter_context(torch._dynamo.config.patch(limit))
        yield


def check(pipe: Any, method: Method, sampling: Sampling, kernels: str = "auto") -> None:
    """Raise Unavailable if a method fails on two images, in ten steps at most.

    That is more than the steps that caches begin with, and do nothing at. Arguments as of
    :func:`applied`. An error of full depth or of a schedule alone is raised as it is.
    """
    brief = replace(sampling, steps=min(sampling.steps, 10))
    model = denoiser_of(pipe)
    with applied(pipe, method, brief, kernels):
        try:
            generate_latents(pipe, some_items(model, 2), range(2), brief)
        except AccelkitError:
            raise
        except Exception as error:  # whatever a library says that does not know the model
            if method.baseline is None and method.compile is None:
                raise
            raise cannot_run(method.name, model, error) from error
        if method.compile == GRAPHS and not enabled_on(pipe).fused.graphs:  # type: ignore[union-attr]
            raise Unavailable(f"no call of {method.name} can be captured as a graph")


def _saving(model: nn.Module, schedule: Schedule, levels: Sequence[float]) -> float:
    try:
        return schedule.ideal_saving(levels, cost_of(model))
    except AccelkitError:  # it cannot be counted: the share of blocks, with a warning
        return ideal_saving(model, schedule, levels)


_kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[nn.Module, ExitStack]]] = (
    weakref.WeakKeyDictionary()
)


def _compiled(pipe: Any, method: Method, sampling: Sampling, kernels: str) -> nn.Module:
    """Return the copy of a pipeline's network that runs by a method, compiled."""
    model = denoiser_of(pipe)
    key = (
        str(method.schedule),
        method.baseline and (method.baseline, *method.options.items(), sampling),
        method.compile,
        method.eager,
        kernels,
    )
    kept = _kept.setdefault(model, {})
    if key not in kept:
        try:
            twin = twin_of(model, shared=method.compile != GRAPHS)
        except AccelkitError as error:
            raise Unavailable(str(error)) from error
        with in_place_of_its_own(pipe, twin), ExitStack() as stack:
            _put_on(stack, pipe, method, sampling, kernels)
            if method.compile != GRAPHS:
                twin.compile(backend=method.compile, dynamic=False)
            kept[key] = twin, stack.pop_all()  # what was put on it stays
    return kept[key][0]


def _put_on(stack: ExitStack, pipe: Any, method: Method, sampling: Sampling, kernels: str) -> None:
    """Put schedule and cache on a pipeline's network until ``stack`` is closed."""
    schedule, by_torch = method.schedule, method.compile not in (None, GRAPHS)
    kernels = "off" if by_torch or method.eager else kernels
    try:
        if not schedule.full or not (by_torch or method.baseline):
            stack.enter_context(enable(pipe, schedule, kernels=kernels))
        if method.compile == GRAPHS:
            graphs.compile(pipe)
        if method.baseline is not None:
            target = Target(pipe, sampling)
            stack.enter_context(cached(target, method.baseline, method.options))
            conflicts.check(target.backbone, schedule)
    except Unavailable:
        raise
    except AccelkitError as error:
        if method.kind in ("full", "schedule"):
            raise
        raise Unavailable(str(error)) from error


def _read(name: str, backbone: Backbone) -> Method:
    """Read one method; what is no cache, compile, eager or steps is the schedule."""
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
    eager = eager and baseline is None and backend in (None, GRAPHS)  # the others are, anyway
    parsed = _schedule(schedule, name, backbone)
    return Method(name, parsed, baseline, options, backend, eager, steps)


def _schedule(parts: list[str], name: str, backbone: Backbone) -> Schedule:
    """Read what is left of a method; Schedule.parse has one that merges end in how."""
    merging = [part for part in parts if re.fullmatch(r"tome:[^@]*", part, re.IGNORECASE)]
    whole = [part for part in parts if part not in merging]
    plain = [part for part in whole if re.fullmatch(r"[\w-]+(:[^@.]*)?", part)]
    if "@" in name:  # its + may be of a literal's intervals
        plain = []
    for part in plain:
        _check_name(part, backbone)
    if len(merging) > 1 or len(plain) > 1:
        twice = merging if len(merging) > 1 else plain
        raise AccelkitError(f"{name!r} has both {' and '.join(twice)}; a method has one of a kind")
    return Schedule.parse(
        "+".join(["+".join(whole) or "full", *merging]), backbone.depth, backbone.family
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
        f"cannot read {name!r}: write steps:20 for 20 steps, or steps alone for as many as cost "
        "what each of the schedules does"
    )
