"""Switches a schedule on and off, on a user's own model or pipeline."""

from __future__ import annotations

import copy
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from accelkit.backbones import Backbone, called_by
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.noise.axis import NoiseAxis
from accelkit.preset_names import SEQUENTIAL, preset_family, preset_names
from accelkit.runtime import conflicts, hooks, patching, routing
from accelkit.runtime.fused import FusedForward, fused_forward, paths
from accelkit.runtime.timesteps import PipelineScheduler, scheduler_getter
from accelkit.schedule import Schedule
from accelkit.subject import Subject

_STATE = "_accelkit"


class Enabled:
    """A schedule in force on a model: what :func:`enable` returns, usable in a ``with``.

    Attributes:
        schedule: the schedule, scaled to the model's depth.
        backbone: the model as a stack of blocks.
        kernels: ``auto`` or ``off``.
    """

    def __init__(self, router: routing.Router, kernels: str) -> None:
        self._router = router
        self.kernels = kernels
        if kernels == "auto":
            router.fused = fused_forward(router.backbone)
        self.schedule: Schedule = router.schedule
        self.backbone: Backbone = router.backbone
        self.handle: Any = None  # of the hook on what torch.compile wrapped the model in

    @property
    def fused(self) -> FusedForward | None:
        """The model's fused forward, None if the model runs its own modules."""
        return self._router.fused

    def paths(self) -> list[str]:
        """Return how each of the model's blocks runs, and why.

        A block that is not fused runs its own modules. So do all blocks in a call that records
        gradients, is traced by torch.compile or merges tokens.
        """
        if self.kernels == "off":
            return ["own modules: kernels are off"] * len(self.backbone.all_blocks)
        return paths(self.backbone)

    @property
    def axis(self) -> NoiseAxis:
        """The noise axis of the scheduler in use."""
        return self._router.axis

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.backbone.model.__dict__.get(_STATE) is self:
            _switch_off(self)

    def __repr__(self) -> str:
        name = self.schedule.name or "schedule"
        return f"<{name} on {type(self.backbone.model).__name__}: {self.schedule}>"


KERNELS = ("auto", "off")


def enable(
    target: Any,
    schedule: str | Path | Schedule,
    *,
    scheduler: Any = None,
    kernels: str = "auto",
) -> Enabled:
    """Let the noise level decide how many blocks each call of ``target`` runs.

    The model's weights, class and state_dict keys do not change. A batch may mix noise levels:
    every sample runs at the depth of its own level. Several threads may call the model afterwards;
    calls already under way have to return first.

    Args:
        target: a diffusers pipeline, its network, or a :class:`accelkit.subject.Subject`.
        schedule: a preset's name, a literal, a file's path (:meth:`Schedule.parse`), or a
            :class:`Schedule` made for a model of this depth.
        scheduler: the scheduler whose timesteps the model is given. Default: the pipeline's, also
            after it is exchanged; for a network alone, the linear betas of DiT.
        kernels: ``auto`` runs a DiT, U-ViT or PixArt without gradients by its fused forward
            (:mod:`accelkit.runtime.fused`): Triton kernels on a CUDA GPU and PyTorch's operators
            elsewhere, with results that differ by rounding. ``off`` runs the model's own modules
            only.

    Returns:
        A handle. Used in a ``with``, it takes the schedule off at the end.

    Raises:
        AccelkitError: the model or a part of it runs a schedule already, no backbone is known for
            its class, the schedule does not fit, the scheduler cannot be placed on the noise axis,
            or ``kernels`` is neither of the two.
        TypeError: ``target`` or ``schedule`` is of another type.

    The model is unchanged if anything is raised.
    """
    if kernels not in KERNELS:
        raise AccelkitError(f"kernels={kernels!r}; expected one of {', '.join(KERNELS)}")
    subject = Subject.of(target, scheduler)
    model = subject.model
    if (old := enabled_on(subject)) is not None:
        raise AccelkitError(
            f"this {type(model).__name__} runs {old.schedule.name or old.schedule} already; "
            "call accelkit.disable first"
        )
    _check_overlap(model)
    _check_pipeline(subject)
    backbone = subject.backbone
    backbone.check()
    _check_blocks(backbone)
    _warn_of_second_network(subject)
    getter = scheduler_getter(subject.target, subject.given)
    router = routing.Router(backbone, fitting(schedule, backbone), getter, subject.axis)
    state = Enabled(router, kernels)
    conflicts.check(backbone, state.schedule)
    _install(state)
    if (compiled := called_by(subject.target)) is not model:
        state.handle = compiled.register_forward_pre_hook(hooks.plan_ahead, with_kwargs=True)
    return state


def disable(target: Any) -> None:
    """Take the schedule off, which restores ``target`` exactly.

    Warns with AccelkitWarning if no schedule is in force. Fine-tuned weights stay. Let calls in
    other threads return first: they would go on without the schedule.

    Args:
        target: a pipeline, its network, or a :class:`accelkit.subject.Subject`.
    """
    model = Subject.of(target).model
    if (state := model.__dict__.get(_STATE)) is None:
        warnings.warn(
            f"this {type(model).__name__} runs no schedule, there is nothing to disable",
            AccelkitWarning,
            stacklevel=2,
        )
        return
    _switch_off(state)


def _switch_off(state: Enabled) -> None:
    model = state.backbone.model
    patching.detach(model)
    if state.fused is not None:
        state.fused.close()
    for name in (_STATE, "__deepcopy__", "__reduce_ex__"):
        del model.__dict__[name]
    if state.handle is not None:
        state.handle.remove()


def enabled_on(target: Any) -> Enabled | None:
    """Return the schedule in force on a pipeline, network or subject, or None."""
    return Subject.of(target).model.__dict__.get(_STATE)


def _install(state: Enabled) -> None:
    model = state.backbone.model
    if (fused := state._router.fused) is not None:
        fused.open()
    try:
        hooks.attach(state._router)
    except BaseException:
        patching.detach(model)
        if fused is not None:
            fused.close()
        raise
    setattr(model, _STATE, state)
    # diffusers' hooks keep running the original's weights in a deep copy, silently
    copier = _Copier(state)
    model.__deepcopy__ = copier  # type: ignore[assignment]
    model.__reduce_ex__ = copier.reduce  # type: ignore[method-assign]


class _Copier:
    """Copies and pickles a model with its schedule, so that a copy runs its own weights."""

    def __init__(self, state: Enabled) -> None:
        self._state = weakref.ref(state)

    def _bare(self, memo: dict[int, Any]) -> tuple[Enabled, nn.Module]:
        """Return the schedule in force and a copy of its model without it."""
        state = self._state()
        assert state is not None  # it lives as long as the model being copied
        if names := conflicts.foreign(state.backbone.model):
            raise AccelkitError(
                f"a copy of this {type(state.backbone.model).__name__} would run the original's "
                f"weights, because diffusers has hooks on it ({', '.join(names)}); copy it first"
            )
        model = state.backbone.model
        twins = patching.bare(model)
        own = twins[model].__dict__
        for name in (_STATE, "__deepcopy__", "__reduce_ex__"):
            del own[name]
        with nullcontext() if state.fused is None else state.fused.bare(own):
            twin = copy.deepcopy(twins[model], memo)
        # whatever refers to a module of the model refers to the copy's after this
        memo.update((id(module), memo[id(stand_in)]) for module, stand_in in twins.items())
        return state, twin

    def __call__(self, memo: dict[int, Any]) -> nn.Module:
        state, twin = self._bare(memo)
        follows = state._router.scheduler
        scheduler = follows.copied(memo) if isinstance(follows, PipelineScheduler) else follows
        router = routing.Router(Subject.of(twin).backbone, state.schedule, scheduler)
        _install(Enabled(router, state.kernels))
        return twin

    def reduce(self, protocol: Any) -> tuple[Any, ...]:
        state, twin = self._bare({})
        return _revived, (twin, state.schedule, state._router.scheduler(), state.kernels)


def _revived(model: nn.Module, schedule: Schedule, scheduler: Any, kernels: str) -> nn.Module:
    enable(model, schedule, scheduler=scheduler, kernels=kernels)
    return model


def fitting(schedule: str | Path | Schedule, backbone: Backbone) -> Schedule:
    """Return the schedule that ``schedule`` means for a model; see :func:`enable`.

    Raises:
        AccelkitError: it cannot be read, or does not fit the model.
        TypeError: it is of another type.
    """
    if isinstance(schedule, (str, Path)):
        schedule = Schedule.parse(schedule, backbone.depth, backbone.family)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"a schedule is a name or a Schedule, not {type(schedule).__name__}")
    counted = preset_family(backbone.family)
    made_for = schedule.family or counted  # one made by hand is for the model it is given for
    if schedule.name.partition("+")[0] in preset_names(SEQUENTIAL):
        made_for = schedule.family or SEQUENTIAL
    if made_for != counted:
        raise AccelkitError(
            f"the schedule {schedule.name or schedule} counts blocks as the {made_for} family "
            f"does, this is a {backbone.family}; make it with family={counted!r}"
        )
    if schedule.layers != backbone.depth:
        raise AccelkitError(
            f"the schedule {schedule.name or schedule} is made for {schedule.layers} blocks, this "
            f"{type(backbone.model).__name__} has {backbone.depth}; use "
            f"schedule.rescaled({backbone.depth})"
        )
    _check_merging(schedule, backbone)
    if schedule.depths[0] < backbone.least:
        raise AccelkitError(
            f"depth {schedule.depths[0]} of {schedule.name or schedule} is below the least that "
            f"a {backbone.family} can run, {backbone.least}"
        )
    return schedule


def _check_blocks(backbone: Backbone) -> None:
    """Raise AccelkitError if a backbone names arguments that its model's blocks do not take."""
    kind, blocks = type(backbone).__name__, list(backbone.blocks)
    if not blocks:
        raise AccelkitError(
            f"{kind} finds no block in this {type(backbone.model).__name__} that a schedule could "
            "count"
        )
    alike = type(backbone).skipped is Backbone.skipped
    needed = dict.fromkeys((backbone.hidden, *(backbone.states if alike else ())))
    for block in blocks:
        names = patching.parameters(block)
        if missing := [name for name in needed if name not in names]:
            raise AccelkitError(
                f"{kind} says that blocks take {missing[0]}, a {type(block).__name__} takes "
                f"{', '.join(names)}; set its states and hidden, or, where blocks take different "
                "ones, say in skipped what a skipped block returns"
            )


def _check_overlap(model: nn.Module) -> None:
    """Raise AccelkitError where a module of ``model`` is hooked for another network's schedule."""
    for name, module in model.named_modules():
        if patching.HOOK not in conflicts.list_of_hooks(module):
            continue
        if module is model:
            raise AccelkitError(
                f"this {type(model).__name__} is part of a network that runs a schedule; call "
                "accelkit.disable on that network first"
            )
        raise AccelkitError(
            f"part of this {type(model).__name__}, {name}, runs a schedule; call accelkit.disable "
            "on it first"
        )


def _check_pipeline(subject: Subject) -> None:
    """Raise AccelkitError for a pipeline whose samples have several noise levels at once."""
    if getattr(getattr(subject.target, "config", None), "expand_timesteps", False):
        raise AccelkitError(
            f"this {type(subject.target).__name__} gives its {type(subject.model).__name__} a "
            "timestep for every token (expand_timesteps), so that a sample has no one noise level "
            "to schedule"
        )


def _warn_of_second_network(subject: Subject) -> None:
    """Warn of a second network of a pipeline, for lower noise, which stays at full depth."""
    other = getattr(subject.target, "transformer_2", None)
    if other is not None and other is not subject.model:
        warnings.warn(
            f"this {type(subject.target).__name__} has two networks, of which the schedule runs on "
            "the one for high noise only; for the other, call "
            "accelkit.enable(pipe.transformer_2, ..., scheduler=pipe.scheduler)",
            AccelkitWarning,
            stacklevel=3,
        )


def _check_merging(schedule: Schedule, backbone: Backbone) -> None:
    if schedule.merges and not any(backbone.attentions()):
        raise AccelkitError(
            f"tokens cannot be merged in a {backbone.family}: accelkit knows no self-attention in "
            f"{type(backbone.model).__name__} that takes them in any order; leave "
            f"{schedule.merges[0]} out of the schedule"
        )
    for merge in schedule.merges:
        if merge.blocks > (blocks := len(backbone.all_blocks)):
            raise AccelkitError(
                f"{merge} merges tokens in {merge.blocks} blocks, this "
                f"{type(backbone.model).__name__} has {blocks}"
            )
