"""Puts a schedule's routing into a model.

Hooks of four kinds, all diffusers' own, per instance and removable. The model's hook plans the call
and sorts a mixed batch deepest first. A block's hook, on every block that may be skipped, passes
the states on or runs the rows still active. The exit's hook joins the rows that left early with the
rest. An attention's hook merges tokens. Blocks that every noise level runs carry no hook, so a full
schedule costs nothing on a model's own modules. The model's hook is also where a fused forward
replaces the model's own (:mod:`accelkit.runtime.fused`).
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
from accelkit.runtime.routing import PlannedPass, Router, RunningPass


def attach(router: Router) -> None:
    """Hook ``router`` into its model."""
    backbone, schedule = router.backbone, router.schedule
    if schedule.full and router.fused is None:
        return
    call_hook = _CallHook(router)
    put(backbone.model, call_hook)
    # Dynamo's protocol for modules that adapt to their first input: it calls `_infer_parameters`
    # outside of its graph, before every call of a model that torch.compile wraps.
    backbone.model._initialize_hook = None  # type: ignore[assignment]
    backbone.model._infer_parameters = plan_ahead  # type: ignore[assignment]
    if backbone.sequential and backbone.exit is not None:
        put(backbone.exit, _ExitHook(router, backbone.exit))
    for index, block in enumerate(backbone.blocks):
        if index >= schedule.depths[0]:
            put(block, _BlockHook(router, block, index))
    if schedule.merges:
        _attach_merging(router)
    call_hook.caches = conflicts.CacheWatch(backbone, schedule)


def _attach_merging(router: Router) -> None:
    backbone, merges = router.backbone, router.schedule.merges
    blocks = backbone.all_blocks
    for index, (block, attentions) in enumerate(zip(blocks, backbone.attentions(), strict=True)):
        if not any(merge.merges(index, len(blocks)) for merge in merges):
            continue
        if HOOK not in conflicts.list_of_hooks(block):
            put(block, _BlockHook(router, block))
        for attention in attentions:
            put(attention, _AttentionHook(router, index, attention))


_PASSES = "_accelkit_passes"


def plan_ahead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Plan a call of a compiled model, whose graph cannot read its timestep.

    The passes become one more argument of the call: ``kwargs`` is the dictionary that the model is
    about to be called with. The graph is specialised to what is spent, so there is one for each
    depth and merging.
    """
    model = getattr(module, "_orig_mod", module)
    hook = HookRegistry.check_if_exists_or_initialize(model).get_hook(HOOK)
    if not isinstance(hook, _CallHook) or _PASSES in kwargs:  # a full schedule hooks nothing
        return
    kwargs[_PASSES] = hook.plan_for_graph(args, kwargs)


_OTHER_GRAPHS = 8  # dynamo's default limit, for whatever else differs between calls


class _CallHook(Hook):
    """Plans a call; runs a mixed batch deepest first, or in one pass per depth."""

    can_be_outside = True
    caches: conflicts.CacheWatch

    def __init__(self, router: Router) -> None:
        super().__init__(router)
        self.signature = inspect.signature(type(router.backbone.model).forward)
        self.names = parameters(router.backbone.model)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[PlannedPass]:
        """Return the passes that a call needs."""
        router, backbone = self.router, self.router.backbone
        recording.refuse(router.schedule)
        if not torch.compiler.is_dynamo_compiling():  # dynamo cannot trace the check
            self.caches.check()
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        timestep = backbone.timestep(arguments)
        grid = backbone.grid(arguments) if router.schedule.merges else None
        # At one depth the batch size decides nothing, and a recording must not depend on it.
        recorded = len(router.schedule.computes) == 1 and recording.by()
        batch = 1 if recorded else len(self._sample(arguments))
        passes = router.passes(timestep, batch, backbone.narrows(arguments), grid)
        if len(passes) > 1 or passes[0].plan.active is not None:
            conflicts.check_mixed(backbone.model)
        return passes

    def plan_for_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[PlannedPass]:
        """Return the passes of a call for which torch.compile makes a graph per plan."""
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

    def around(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run the model by ``forward``, which is compiled in place."""
        return self._route(self.plan_for_graph(args, kwargs), forward, args, kwargs)

    def _route(self, passes: list[PlannedPass], forward: Any, args: Any, kwargs: Any) -> Any:
        router = self.router
        taps = router.taps if torch.is_grad_enabled() else None
        if len(passes) == 1 and passes[0].rows is None and taps is None:
            return self._run(RunningPass(passes[0].plan), passes[0], forward, args, kwargs)
        arguments = dict(self.signature.bind(router.backbone.model, *args, **kwargs).arguments)
        del arguments[next(iter(arguments))]  # the module itself
        sample = self._sample(arguments)
        whole = torch.arange(len(sample))
        order = [(whole if p.rows is None else p.rows).to(sample.device) for p in passes]
        running = [RunningPass(p.plan) for p in passes]
        outputs = [
            self._run(own, planned, forward, (), self._select(arguments, index))
            for own, planned, index in zip(running, passes, order, strict=True)
        ]
        if taps is not None:
            taps.finish(
                lambda own, index: router.run(own, forward, **self._select(arguments, index)),
                list(zip(running, order, strict=True)),
            )
        return _joined(outputs, torch.argsort(torch.cat(order)))

    def _run(
        self, running: RunningPass, planned: PlannedPass, forward: Any, args: Any, kwargs: Any
    ) -> Any:
        router = self.router
        if router.fused is None or torch.compiler.is_compiling():
            return router.run(running, forward, *args, **kwargs)
        step = router.timesteps.step(planned.timestep)
        return router.run(running, router.fused, planned.plan, step, forward, args, kwargs)

    def _sample(self, arguments: dict[str, Any]) -> Tensor:
        names = self.router.backbone.batched
        name = names[0] if names else self.names[0]
        if name not in arguments:
            raise TypeError(f"{type(self.router.backbone.model).__name__} needs {name}")
        return arguments[name]

    def _select(self, arguments: dict[str, Any], index: Tensor) -> dict[str, Any]:
        names, batch = self.router.backbone.batched, len(self._sample(arguments))

        def per_sample(name: str, value: Any) -> bool:
            if names is not None:
                return name in (*names, "timestep")
            return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch

        return {k: rows(v, index) if per_sample(k, v) else v for k, v in arguments.items()}


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
    """Runs a block on the rows that are deep enough for it.

    Without an index the block always runs on all rows. The hook is then there for the hooks within
    the block, which need the plan again when gradient checkpointing recomputes the block.
    """

    can_be_outside = True

    def __init__(self, router: Router, block: nn.Module, index: int | None = None) -> None:
        super().__init__(router)
        self.index = index
        self.names = parameters(block)

    def around(self, forward: Any, args: Any, kwargs: Any) -> Any:
        router = self.router
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        running = router.pass_for_block(arguments[router.backbone.hidden])
        if running.recomputed:
            return router.run(running, self._run, running, arguments, forward, args, kwargs)
        return self._run(running, arguments, forward, args, kwargs)

    def _run(
        self, running: RunningPass, arguments: Any, forward: Any, args: Any, kwargs: Any
    ) -> Any:
        backbone, plan, index = self.router.backbone, running.plan, self.index
        count = None if index is None else plan.rows_at(index)
        if index is None or count is None:
            return forward(*args, **kwargs)
        hidden = arguments[backbone.hidden]
        exits = (count == 0 or count < len(hidden)) and index <= plan.depth
        if backbone.sequential and exits and not running.recomputed:
            running.exited[index] = hidden[count:]
        if count == 0:
            return self._skipped(index, running, arguments)
        ran = forward(**self._narrow(arguments, slice(count)))
        if backbone.sequential or count == len(hidden):
            return ran
        passed = backbone.skipped(index, self._narrow(arguments, slice(count, None)), None)
        return torch.cat([ran, passed])

    def _skipped(self, index: int, running: RunningPass, arguments: dict[str, Any]) -> Any:
        """Return the states after a block that all samples skip.

        With a shortcut the block passes its states on, and the last one applies the shortcut.
        """
        backbone, plan = self.router.backbone, running.plan
        depth = plan.depth if plan.active is None else None
        if (
            depth is not None
            and index == depth
            and not any(map(conflicts.watched, list(backbone.blocks)[depth:]))
            and recording.by() is None  # a shortcut copies weights, which a recording replaces
        ):
            running.shortcut = backbone.shortcut(depth, arguments[backbone.hidden])
        if running.shortcut is None:
            return backbone.skipped(index, arguments, depth)
        running.skipped.append(arguments)
        if index + 1 < backbone.depth:
            return backbone.passed_on(arguments)
        return running.shortcut(running.skipped)

    def _narrow(self, arguments: dict[str, Any], index: slice) -> dict[str, Any]:
        backbone = self.router.backbone
        per_sample = (*backbone.states, *(backbone.block_batched or ()))
        return {k: rows(v, index) if k in per_sample else v for k, v in arguments.items()}


class _AttentionHook(Hook):
    """Merges similar tokens before self-attention and restores their number after it."""

    def __init__(self, router: Router, index: int, attention: nn.Module) -> None:
        super().__init__(router)
        blocks = len(router.backbone.all_blocks)
        merges = router.schedule.merges
        self.ratios = [m.ratio if m.merges(index, blocks) else 0.0 for m in merges]
        self.name = parameters(attention)[0]

    def around(self, forward: Any, args: Any, kwargs: Any) -> Any:
        running = self.router.running
        assert running is not None  # the block's hook has made sure
        plan = running.plan
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
    """Gives the exit every sample's states as they were after the sample's last block.

    What others add behind a skipped block, such as a ControlNet's residual, is left out.
    """

    def __init__(self, router: Router, exit: nn.Module) -> None:
        super().__init__(router)
        self.name = parameters(exit)[0]

    def around(self, forward: Any, args: Any, kwargs: Any) -> Any:
        running = self.router.running
        if running is None or not running.exited:
            return forward(*args, **kwargs)
        exited = running.exited
        ran = args[0] if args else kwargs[self.name]
        # The deepest rows have not exited if they ran every block, or if the model itself did not
        # call the next one.
        parts = [] if running.plan.depth in exited else [ran]
        parts += [exited[index].to(ran) for index in sorted(exited, reverse=True)]
        hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
        if args:
            return forward(hidden, *args[1:], **kwargs)
        return forward(**{**kwargs, self.name: hidden})
