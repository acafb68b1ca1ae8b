"""Runs a schedule: hooks that skip blocks by noise level and let samples leave a batch early.

Three kinds of hook, all diffusers' own, per instance and removable: one on the model plans the call
and sorts a mixed batch deepest first; one on every block that may be skipped passes the hidden
states on or runs the rows still active; one on the exit joins the rows that left with the rest.
Blocks that every noise level runs carry no hook, so a full schedule costs nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError
from accelkit.noise import NoiseAxis
from accelkit.schedule import Schedule

HOOK = "accelkit"


@dataclass(frozen=True)
class Plan:
    """What one call of the model runs.

    Attributes:
        depth: blocks run by the deepest sample.
        active: rows that run each block, never rising; None when all samples are equally deep.
        order: row indices, deepest first; None when the batch is so already.
        grad: whether the call records gradients.
    """

    depth: int
    active: tuple[int, ...] | None
    order: Tensor | None
    grad: bool


class Router:
    """Decides per call, from its timesteps, how deep each sample goes.

    Args:
        backbone: the model.
        schedule: what to spend at which noise level.
        scheduler: returns the scheduler in use, or None for the reference process. Asked at every
            call, since a pipeline's scheduler may be exchanged.
    """

    def __init__(
        self, backbone: Backbone, schedule: Schedule, scheduler: Callable[[], Any]
    ) -> None:
        self.backbone = backbone
        self.schedule = schedule
        self.current: Plan | None = None
        self.left: dict[int, Tensor] | None = None  # rows that left, while a call is under way
        self._plans = WeakTensorKeyDictionary()  # a recomputed block belongs to an earlier call
        self.scheduler = scheduler
        self._axis: tuple[Any, NoiseAxis] | None = None
        self._visited: tuple[Tensor, list[float]] | None = None

    @property
    def axis(self) -> NoiseAxis:
        """The noise axis of the scheduler in use."""
        scheduler = self.scheduler()
        if self._axis is None or self._axis[0] is not scheduler:
            self._axis = (scheduler, NoiseAxis.of(scheduler))
        return self._axis[1]

    def start(self, timestep: Tensor | float, batch: int) -> Plan:
        """Plan a call of ``batch`` samples; ``timestep`` has one value, or one per sample."""
        level = self.axis.level
        depths = [self.schedule.depth_at(level(t)) for t in self._values(timestep)]
        grad = torch.is_grad_enabled()
        if min(depths) == max(depths):
            return Plan(depths[0], None, None, grad)
        if len(depths) != batch:
            raise AccelkitError(
                f"got {len(depths)} timesteps for a batch of {batch}; give one, or one per sample"
            )
        order = sorted(range(batch), key=lambda row: -depths[row])
        active = tuple(sum(d > i for d in depths) for i in range(max(depths)))
        index = None if order == list(range(batch)) else torch.tensor(order)
        return Plan(max(depths), active, index, grad)

    def remember(self, timestep: Any, plan: Plan) -> None:
        """Make ``plan`` the current one and, under gradients, the one of this timestep tensor."""
        self.current, self.left = plan, {}
        if plan.grad and isinstance(timestep, Tensor):
            self._plans[timestep] = plan

    def plan_of(self, timestep: Any) -> Plan:
        """Return the plan of the call that a block is run for."""
        assert self.current is not None  # a block's hook runs inside its model's
        if self.current.grad and not torch.is_grad_enabled():
            raise AccelkitError(
                "a schedule cannot run inside reentrant gradient checkpointing, where gradients of "
                "samples that leave would be lost; enable it with use_reentrant=False"
            )
        if torch.is_grad_enabled() and isinstance(timestep, Tensor):
            return self._plans.get(timestep, self.current)
        return self.current

    def _values(self, timestep: Tensor | float) -> list[float]:
        if not isinstance(timestep, Tensor):
            return [float(timestep)]
        if timestep.numel() > 1 and any(timestep.stride()):
            return timestep.flatten().tolist()
        return [self._single(timestep)]

    def _single(self, timestep: Tensor) -> float:
        """Return the one value of ``timestep`` without waiting for the device if possible.

        A sampling loop hands on elements of ``scheduler.timesteps``. Such a view's place in the
        storage tells which one it is, so only the first call of a run reads the device.
        """
        all_steps = getattr(self.scheduler(), "timesteps", None)
        if timestep.is_cpu or not isinstance(all_steps, Tensor):
            return timestep.flatten()[0].item()
        place = place_in(timestep, all_steps)
        if place is None:
            return timestep.flatten()[0].item()
        if self._visited is None or self._visited[0] is not all_steps:
            self._visited = (all_steps, all_steps.tolist())
        return self._visited[1][place]


def place_in(view: Tensor, whole: Tensor) -> int | None:
    """Return which element of the 1-D ``whole`` a one-valued ``view`` shows, None if it doesn't."""
    same = (
        view.dtype == whole.dtype
        and view.device == whole.device
        and view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    )
    offset = int(view.storage_offset()) - int(whole.storage_offset())
    place, rest = divmod(offset, max(1, whole.stride(0)))
    return place if same and rest == 0 and 0 <= place < len(whole) else None


def attach(router: Router) -> None:
    """Hook ``router`` into its model."""
    backbone, schedule = router.backbone, router.schedule
    if schedule.depths == (backbone.depth,):
        return
    _hook(backbone.model, _CallHook(router))
    _hook(backbone.exit, _ExitHook(router))
    for index, block in enumerate(backbone.blocks):
        if index >= schedule.depths[0]:
            _hook(block, _BlockHook(router, index, block))


def detach(model: nn.Module) -> None:
    """Take every accelkit hook off ``model``, leaving no trace and every other hook at work."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook(HOOK)
        if registry is None or not isinstance(hook, _Hook):
            continue
        outer = module.__dict__["forward"]
        _remove(registry)
        if module.__dict__.get("_old_forward") is hook.installed:  # accelerate's hooks wrap ours
            module._old_forward, module.forward = module.forward, outer  # type: ignore[assignment]
        elif not registry.hooks and not hook.had_forward:
            module.__dict__.pop("forward", None)
        if not registry.hooks and not hook.had_registry:
            del module._diffusers_hook


def _remove(registry: HookRegistry) -> None:
    """Remove our hook from a chain; diffusers would drop the next one's own forward with it."""
    place = registry._hook_order.index(HOOK) + 1
    after = registry._fn_refs[place] if place < len(registry._fn_refs) else None
    own = after.forward if after is not None and after.original_forward is not None else None
    registry.remove_hook(HOOK, recurse=False)
    if after is not None and own is not None:
        after.original_forward, after.forward = after.forward, own


def _hook(module: nn.Module, hook: _Hook) -> None:
    hook.had_forward = "forward" in module.__dict__
    hook.had_registry = "_diffusers_hook" in module.__dict__
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
    hook.installed, hook.own = module.forward, hook.fn_ref.forward


class _Hook(ModelHook):
    had_forward = had_registry = False
    installed: Any = None  # the module's forward with this hook
    own: Any = None  # what this hook runs in place of the module's forward

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router


class _CallHook(_Hook):
    """Plans the call; sorts a mixed batch on the way in and restores its order on the way out."""

    def __init__(self, router: Router) -> None:
        super().__init__(router)
        self.signature = inspect.signature(type(router.backbone.model).forward)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _, *given = self.signature.bind(module, *args, **kwargs).arguments.items()
        call = dict(given)
        timestep = call.get("timestep")
        if timestep is None:
            raise AccelkitError(
                "a model with a schedule needs its timestep to know the noise level; got None"
            )
        per_sample = self.router.backbone.batched
        plan = self.router.start(timestep, len(call[per_sample[0]]))
        if plan.order is not None:
            order = plan.order.to(call[per_sample[0]].device)
            for name in (*per_sample, "timestep"):
                call[name] = _rows(call.get(name), order)
        self.router.remember(call["timestep"], plan)
        return (), call

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        plan = self.router.current
        if plan is None or plan.order is None:
            return output
        inverse = torch.argsort(plan.order)
        if isinstance(output, tuple):
            return tuple(_rows(value, inverse) for value in output)
        return type(output)(**{name: _rows(value, inverse) for name, value in output.items()})


class _BlockHook(_Hook):
    """Runs one block on the rows that are deep enough for it."""

    def __init__(self, router: Router, index: int, block: nn.Module) -> None:
        super().__init__(router)
        self.index = index
        self.names = list(inspect.signature(type(block).forward).parameters)[1:]
        self.timestep_at = self.names.index("timestep") if "timestep" in self.names else None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.fn_ref.forward is not self.own:  # diffusers removed a hook from under this one
            self.fn_ref.original_forward, self.fn_ref.forward = self.fn_ref.forward, self.own
        return args, kwargs

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        place = self.timestep_at
        timestep = kwargs.get("timestep")
        if timestep is None and place is not None and len(args) > place:
            timestep = args[place]
        plan = self.router.plan_of(timestep)
        if self.index >= plan.depth:
            return args[0] if args else kwargs[self.names[0]]
        if plan.active is None:
            return forward(*args, **kwargs)
        call = dict(zip(self.names, args, strict=False)) | kwargs
        hidden, stay = call[self.names[0]], plan.active[self.index]
        if stay < len(hidden):
            if self.router.left is not None:  # None while checkpointing recomputes the block
                self.router.left[self.index] = hidden[stay:]
            call[self.names[0]] = hidden[:stay]
        for name in self.router.backbone.block_batched:
            call[name] = _rows(call.get(name), slice(stay))
        return forward(**call)


class _ExitHook(_Hook):
    """Joins the samples that left early with those that ran to the end."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        left, self.router.left = self.router.left, None
        if left:
            hidden = torch.cat([args[0], *(left[i] for i in sorted(left, reverse=True))])
            args = (hidden, *args[1:])
        return args, kwargs


def _rows(value: Any, index: Tensor | slice) -> Any:
    """Return the rows of a per-sample argument; None and what all samples share pass through."""
    per_sample = isinstance(value, Tensor) and value.ndim > 0 and len(value) > 1
    return value[index] if per_sample else value
