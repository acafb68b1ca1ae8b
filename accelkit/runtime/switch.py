"""Switch a schedule on and off, on a user's own model or pipeline."""

from __future__ import annotations

import copy
import warnings
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from accelkit.backbones import Backbone, backbone_of, called_by, denoiser_of
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.noise.axis import NoiseAxis
from accelkit.preset_names import SEQUENTIAL, preset_family, preset_names
from accelkit.runtime import conflicts, hooks, patching, routing
from accelkit.runtime.fused import FusedForward, fused_forward, paths
from accelkit.runtime.timesteps import PipelineScheduler, scheduler_getter
from accelkit.schedule import Schedule

_STATE = "_accelkit"


class Enabled:
    """A schedule in force on a model: what :func:`enable` returns, usable in a ``with``.

    Attributes:
        schedule: the schedule, scaled to the model's depth.
        backbone: the model as accelkit sees it.
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
        """The model's fused forward, None where it runs its own modules."""
        return self._router.fused

    def paths(self) -> list[str]:
        """Return for each of the model's blocks by which path it runs, and why.

        A block that is not fused runs as it is. A call that records gradients, that torch.compile
        traces, or that merges tokens runs all of them so.
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
        if enabled_on(self.backbone.model) is self:
            disable(self.backbone.model)

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

    The model's weights, class and state_dict keys stay as they are. A batch may mix noise levels:
    every sample gets the depth of its own. Several threads may call the model from then on; calls
    that are under way have to return first.

    Args:
        target: a diffusers pipeline, or the network itself.
        schedule: a preset's name, a literal, a file's path (:meth:`Schedule.parse`), or a
            :class:`Schedule` made for a model of this depth.
        scheduler: what tells the noise level of a timestep. Default: the pipeline's scheduler,
            also when it is exchanged later; for a bare network the linear betas of DiT.
        kernels: ``auto`` runs a DiT, U-ViT or PixArt without gradients by its fused forward
            (:mod:`accelkit.runtime.fused`), Triton kernels on a CUDA GPU and PyTorch's operators
            elsewhere, whose results differ by rounding; ``off`` runs nothing but the model's own
            modules.

    Returns:
        A handle that can be used in a ``with``, which disables at its end.

    Raises:
        AccelkitError: the model has a schedule already, or a part of it has, no backbone is known
            for its class, the schedule does not fit, the scheduler cannot be placed on the noise
            axis, or ``kernels`` is neither.
        TypeError: ``target`` or ``schedule`` is of another type.

    Whatever is raised, the model is as it was before.
    """
    if kernels not in KERNELS:
        raise AccelkitError(f"kernels={kernels!r}; expected one of {', '.join(KERNELS)}")
    model = denoiser_of(target)
    if (old := enabled_on(model)) is not None:
        raise AccelkitError(
            f"this {type(model).__name__} runs {old.schedule.name or old.schedule} already; "
            "call accelkit.disable first"
        )
    _check_overlap(model)
    _check_pipeline(target, model)
    backbone = backbone_of(model)
    backbone.check()
    _check_blocks(backbone)
    _tell_of_another_network(target, model)
    router = routing.Router(
        backbone, fitting(schedule, backbone), scheduler_getter(target, scheduler)
    )
    state = Enabled(router, kernels)
    _ = state.axis  # fails here rather than at the first step
    conflicts.check(backbone, state.schedule)
    _install(state)
    if (compiled := called_by(target)) is not model:
        state.handle = compiled.register_forward_pre_hook(hooks.plan_ahead, with_kwargs=True)
    return state


def disable(target: Any) -> None:
    """Take the schedule off: ``target`` is again exactly what it was.

    Warns with AccelkitWarning if none is in force. Fine-tuned weights stay. A call that another
    thread has under way goes on without the schedule: let it return first.
    """
    model = denoiser_of(target)
    if enabled_on(model) is None:
        warnings.warn(
            f"this {type(model).__name__} runs no schedule, there is nothing to disable",
            AccelkitWarning,
            stacklevel=2,
        )
        return
    state = model.__dict__[_STATE]
    _uninstall(model)
    if state.handle is not None:
        state.handle.remove()


def enabled_on(target: Any) -> Enabled | None:
    """Return the schedule in force on a pipeline or network, or None."""
    return denoiser_of(target).__dict__.get(_STATE)


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


def _uninstall(model: nn.Module) -> None:
    patching.detach(model)
    if (fused := model.__dict__[_STATE].fused) is not None:
        fused.close()
    for name in (_STATE, "__deepcopy__", "__reduce_ex__"):
        del model.__dict__[name]


class _Copier:
    """Copies and pickles a model with its schedule: every copy runs its own weights."""

    def __init__(self, state: Enabled) -> None:
        self._state = weakref.ref(state)

    def _bare(self, memo: dict[int, Any]) -> tuple[Enabled, nn.Module]:
        """Return the schedule in force and a copy of its model without it."""
        state = self._state()
        assert state is not None  # it lives as long as the model being copied
        if names := conflicts.foreign(state.backbone.model):
            raise AccelkitError(
                f"a copy of this {type(state.backbone.model).__name__} would go on running the "
                f"original's weights for what diffusers hooked on it ({', '.join(names)}); copy "
                "it first"
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
        router = routing.Router(backbone_of(twin), state.schedule, scheduler)
        _install(Enabled(router, state.kernels))
        return twin

    def reduce(self, protocol: Any) -> tuple[Any, ...]:
        state, twin = self._bare({})
        return _revived, (twin, state.schedule, state._router.scheduler(), state.kernels)


def _revived(model: nn.Module, schedule: Schedule, scheduler: Any, kernels: str) -> nn.Module:
    enable(model, schedule, scheduler=scheduler, kernels=kernels)
    return model


def fitting(schedule: str | Path | Schedule, backbone: Backbone) -> Schedule:
    """Return the schedule that ``schedule`` means for a model, as :func:`enable` takes it.

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
    """Raise AccelkitError where a backbone does not name what its model's blocks take."""
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


def _check_pipeline(target: Any, model: nn.Module) -> None:
    """Raise AccelkitError for a pipeline that gives its network no one noise level a sample."""
    if getattr(getattr(target, "config", None), "expand_timesteps", False):
        raise AccelkitError(
            f"this {type(target).__name__} gives its {type(model).__name__} a timestep for every "
            "token (expand_timesteps), so that a sample has no one noise level to schedule"
        )


def _tell_of_another_network(target: Any, model: nn.Module) -> None:
    """Warn where a pipeline has a second network, for lower noise, that goes on at full depth."""
    other = getattr(target, "transformer_2", None)
    if other is not None and other is not model:
        warnings.warn(
            f"this {type(target).__name__} has two networks, of which the schedule runs on the one "
            "for high noise alone; for the other, too: "
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
