"""Puts a schedule's routing into a model and takes it out again.

Hooks of four kinds, all diffusers' own, per instance and removable: one on the model plans the call
and sorts a mixed batch deepest first; one on every block that may be skipped passes its states on
or runs the rows still active; one on the exit joins the rows that left with the rest; one on every
attention that may merge tokens does so. Blocks that every noise level runs as they are carry no
hook, so a full schedule costs nothing on a model's own modules. The hook on the model is also where
a fused forward takes the place of its own (:mod:`accelkit.runtime.fused`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import Tensor, nn

from accelkit.backbones.base import rows
from accelkit.runtime import conflicts, merging, recording
from accelkit.runtime.patching import HOOK, Hook, parameters, put
from accelkit.runtime.routing import Call, Pass, Router


def attach(router: Router) -> None:
    """Hook ``router`` into its model."""
    backbone, schedule = router.backbone, router.schedule
    if schedule.full and router.fused is None:
        return
    call = _CallHook(router)
    put(backbone.model, call)
    # What torch.compile calls, outside of its graph, before every call of a model that it wraps:
    # its own protocol for modules that look at their first input.
    backbone.model._initialize_hook = None  # type: ignore[assignment]
    backbone.model._infer_parameters = plan_ahead  # type: ignore[assignment]
    if backbone.sequential and backbone.exit is not None:
        put(backbone.exit, _ExitHook(router, backbone.exit))
    for index, block in enumerate(backbone.blocks):
        if index >= schedule.depths[0]:
            put(block, _BlockHook(router, index, block))
    if schedule.merges:
        _attach_merging(router)
    hooked = [
        backbone.model,
        *(b for b in backbone.all_blocks if HOOK in conflicts.list_of_hooks(b)),
    ]
    call.watch = conflicts.Watch(backbone, schedule, hooked)
    if router.taps is not None:
        router.taps.attach()


def _attach_merging(router: Router) -> None:
    backbone, schedule = router.backbone, router.schedule
    blocks = backbone.all_blocks
    planned = list(backbone.blocks)[schedule.depths[0] :]  # their own hook asks for the plan
    for index, (block, attentions) in enumerate(zip(blocks, backbone.attentions(), strict=True)):
        if not any(merge.merges(index, len(blocks)) for merge in schedule.merges):
            continue
        if block not in planned:
            put(block, _PlanHook(router, block))
        for attention in attentions:
            put(attention, _AttentionHook(router, index, attention))


_PASSES = "_accelkit_passes"


def plan_ahead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Plan a call of a compiled model, whose graph cannot look at its timestep.

    The passes become one more argument of the call: ``kwargs`` is the dictionary that the model is
    about to be called with. The graph is specialised to what is spent, so there is one for each
    depth and merging.
    """
    model = getattr(module, "_orig_mod", module)
    hook = HookRegistry.check_if_exists_or_initialize(model).get_hook(HOOK)
    if not isinstance(hook, _CallHook) or _PASSES in kwargs:  # a full schedule hooks nothing
        return
    kwargs[_PASSES] = hook.plan_for_graph(args, kwargs)


_OTHER_GRAPHS = 8  # dynamo's own limit, for what else differs between calls


class _CallHook(Hook):
    """Plans the call; runs a mixed batch deepest first, or once per depth, in its own order."""

    can_be_outside = True
    watch: conflicts.Watch

    def __init__(self, router: Router) -> None:
        super().__init__(router)
        self.signature = inspect.signature(type(router.backbone.model).forward)
        self.names = parameters(router.backbone.model)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Pass]:
        """Return the passes that a call needs."""
        recording.refuse(self.router.schedule)
        if not torch.compiler.is_dynamo_compiling():  # which cannot follow what is done there
            self.watch.look()
        call = dict(zip(self.names, args, strict=False)) | kwargs
        backbone = self.router.backbone
        timestep = backbone.timestep(call)
        grid = backbone.grid(call) if self.router.schedule.merges else None
        # at one depth the batch's size decides nothing, and a recording must not depend on it
        one = len(self.router.schedule.computes) == 1 and recording.by()
        batch = 1 if one else len(self._sample(call))
        passes = self.router.passes(timestep, batch, backbone.narrows(call), grid)
        if len(passes) > 1 or passes[0].plan.active is not None:
            conflicts.check_mixed(backbone.model)
        return passes

    def plan_for_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Pass]:
        """Return the passes of a call that torch.compile makes a graph of for what each spends."""
        config = torch._dynamo.config
        needed = _OTHER_GRAPHS + len(set(self.router.schedule.computes))
        config.recompile_limit = max(config.recompile_limit, needed)
        passes = self.plan(args, kwargs)
        for each in passes:
            if each.plan.active is None and not each.plan.grad:
                self.router.backbone.prepare(each.plan.depth)
        return passes

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, passes = self.fn_ref.original_forward, kwargs.pop(_PASSES, None)
        if self.is_outside:
            return forward(*args, **kwargs)
        return self._route(passes or self.plan(args, kwargs), forward, args, kwargs)

    def outside(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run the model, compiled in place."""
        return self._route(self.plan_for_graph(args, kwargs), forward, args, kwargs)

    def _route(self, passes: list[Pass], forward: Any, args: Any, kwargs: Any) -> Any:
        router = self.router
        taps = router.taps if torch.is_grad_enabled() else None
        if len(passes) == 1 and passes[0].rows is None and taps is None:
            return self._run(Call(passes[0].plan), passes[0], forward, args, kwargs)
        arguments = dict(self.signature.bind(router.backbone.model, *args, **kwargs).arguments)
        del arguments[next(iter(arguments))]  # the module itself
        whole = torch.arange(len(self._sample(arguments)))
        order = [whole if p.rows is None else p.rows for p in passes]
        order = [index.to(self._sample(arguments).device) for index in order]
        calls = [Call(p.plan) for p in passes]
        outputs = [
            self._run(call, each, forward, (), self._select(arguments, index))
            for call, each, index in zip(calls, passes, order, strict=True)
        ]
        if taps is not None:
            taps.finish(
                lambda call, rows: router.run(call, forward, **self._select(arguments, rows)),
                list(zip(calls, order, strict=True)),
            )
        return _joined(outputs, torch.argsort(torch.cat(order)))

    def _run(self, call: Call, each: Pass, forward: Any, args: Any, kwargs: Any) -> Any:
        router = self.router
        if router.fused is None or torch.compiler.is_compiling():
            return router.run(call, forward, *args, **kwargs)
        step = router.step(each.timestep)
        return router.run(call, router.fused, each.plan, step, forward, args, kwargs)

    def _sample(self, call: dict[str, Any]) -> Tensor:
        names = self.router.backbone.batched
        name = names[0] if names else self.names[0]
        if name not in call:
            raise TypeError(f"{type(self.router.backbone.model).__name__} needs {name}")
        return call[name]

    def _select(self, call: dict[str, Any], index: Tensor) -> dict[str, Any]:
        names = self.router.backbone.batched
        if names is not None:
            return {k: rows(v, index) if k in (*names, "timestep") else v for k, v in call.items()}
        batch = len(self._sample(call))
        return {
            k: rows(v, index) if isinstance(v, Tensor) and v.ndim and len(v) == batch else v
            for k, v in call.items()
        }


def _joined(outputs: list[Any], inverse: Tensor) -> Any:
    first = outputs[0]

    def join(values: tuple[Any, ...]) -> Any:
        return torch.cat(values)[inverse] if isinstance(values[0], Tensor) else values[0]

    if isinstance(first, dict):  # diffusers' outputs are dictionaries too
        return type(first)(**{name: join(tuple(o[name] for o in outputs)) for name in first})
    if isinstance(first, tuple):
        return tuple(join(values) for values in zip(*outputs, strict=True))
    return join(tuple(outputs))


class _BlockHook(Hook):
    """Runs one block on the rows that are deep enough for it."""

    can_be_outside = True

    def __init__(self, router: Router, index: int, block: nn.Module) -> None:
        super().__init__(router)
        self.index = index
        self.names = parameters(block)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        return forward(*args, **kwargs) if self.is_outside else self.outside(forward, args, kwargs)

    def outside(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run the block by ``forward``, compiled or not."""
        router = self.router
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        call = router.call_of(arguments[router.backbone.hidden])
        if call.again:  # for the hooks within the block
            return router.run(call, self._run, call, arguments, forward, args, kwargs)
        return self._run(call, arguments, forward, args, kwargs)

    def _run(self, call: Call, arguments: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        backbone, stay = self.router.backbone, call.plan.staying(self.index)
        if stay is None:
            return forward(*args, **kwargs)
        hidden = arguments[backbone.hidden]
        leaves = (stay == 0 or stay < len(hidden)) and self.index <= call.plan.depth
        if backbone.sequential and leaves and not call.again:
            call.left[self.index] = hidden[stay:]
        if stay == 0:
            return self._skipped(call, arguments)
        ran = forward(**self._narrow(arguments, slice(stay)))
        if backbone.sequential or stay == len(hidden):
            return ran
        passed = backbone.skipped(self.index, self._narrow(arguments, slice(stay, None)), None)
        return torch.cat([ran, passed])

    def _skipped(self, call: Call, arguments: dict[str, Any]) -> Any:
        """Return what a block that all samples skip does, or passes on for a shortcut to do."""
        backbone, plan = self.router.backbone, call.plan
        depth = plan.depth if plan.active is None else None
        if (
            depth is not None
            and self.index == depth
            and not any(map(conflicts.watched, list(backbone.blocks)[depth:]))
            and recording.by() is None  # which has the weights that a shortcut would copy
        ):
            call.shortcut = backbone.shortcut(depth, arguments[backbone.hidden])
        if call.shortcut is None:
            return backbone.skipped(self.index, arguments, depth)
        call.skipped.append(arguments)
        if self.index + 1 < backbone.depth:
            return backbone.passed_on(arguments)
        return call.shortcut(call.skipped)

    def _narrow(self, call: dict[str, Any], index: slice) -> dict[str, Any]:
        backbone = self.router.backbone
        per_sample = (*backbone.states, *(backbone.block_batched or ()))
        return {k: rows(v, index) if k in per_sample else v for k, v in call.items()}


class _PlanHook(Hook):
    """Keeps the plan that a block is run for, for when it is run again for its gradients."""

    def __init__(self, router: Router, block: nn.Module) -> None:
        super().__init__(router)
        self.names = parameters(block)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        router, forward = self.router, self.fn_ref.original_forward
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        call = router.call_of(arguments[router.backbone.hidden])
        if call.again:
            return router.run(call, forward, *args, **kwargs)
        return forward(*args, **kwargs)


class _AttentionHook(Hook):
    """Merges similar tokens before self-attention and gives each its own output again after it."""

    def __init__(self, router: Router, index: int, attention: nn.Module) -> None:
        super().__init__(router)
        blocks = len(router.backbone.all_blocks)
        merges = router.schedule.merges
        self.ratios = [m.ratio if m.merges(index, blocks) else 0.0 for m in merges]
        self.name = parameters(attention)[0]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward, call = self.fn_ref.original_forward, self.router.call
        assert call is not None  # its block has begun
        plan = call.plan
        ratio = 0.0 if plan.merge is None else self.ratios[plan.merge]
        if plan.grid is None or not ratio:
            return forward(*args, **kwargs)
        tokens = args[0] if args else kwargs[self.name]
        protected = self.router.backbone.tokens_protected
        matching = merging.match(tokens, plan.grid, ratio, protected)
        if matching is None:
            return forward(*args, **kwargs)
        merged = merging.merge(tokens, matching)
        if args:
            return merging.unmerge(forward(merged, *args[1:], **kwargs), matching)
        return merging.unmerge(forward(**{**kwargs, self.name: merged}), matching)


class _ExitHook(Hook):
    """Gives the exit every sample's states as they were after its own last block.

    What others added behind a skipped block, such as a ControlNet's residual, is not among them.
    """

    def __init__(self, router: Router, exit: nn.Module) -> None:
        super().__init__(router)
        self.name = parameters(exit)[0]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call, forward = self.router.call, self.fn_ref.original_forward
        if call is None or not call.left:
            return forward(*args, **kwargs)
        plan, left = call.plan, call.left
        ran = args[0] if args else kwargs[self.name]
        # the deepest rows are still here if they ran every block, or the model passed over the next
        parts = [] if plan.depth in left else [ran]
        parts += [left[index].to(ran) for index in sorted(left, reverse=True)]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        if args:
            return forward(hidden, *args[1:], **kwargs)
        return forward(**{**kwargs, self.name: hidden})
