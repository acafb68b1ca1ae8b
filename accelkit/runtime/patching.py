"""Puts diffusers hooks on the modules of one model and takes them off without a trace.

``module.compile()``, which diffusers' ``compile_repeated_blocks`` calls for every block, compiles
a module's call together with its hooks. A hook's decisions would become part of the graph: the
model's hook would break the graph at the timestep, and a block's hook would need a graph for every
block and depth. So these hooks are kept outside of the graph.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from accelkit.runtime.routing import Router

HOOK = "accelkit"
TAP = "accelkit-tap"
"""Names of the hooks on a module, innermost first."""


def detach(model: nn.Module, *names: str) -> None:
    """Take accelkit's hooks, all or those named, off ``model`` without a trace; others stay."""
    for module in model.modules():
        for name in names or (TAP, HOOK):
            _take_off(module, name)
    if not names:
        for name in ("_initialize_hook", "_infer_parameters"):
            model.__dict__.pop(name, None)


def _take_off(module: nn.Module, name: str) -> None:
    registry = module.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook(name)
    if registry is None or not isinstance(hook, Hook):
        return
    outer = module.__dict__["forward"]
    if module.__dict__.get("_original_forward") is hook.installed:  # cache-dit will restore it
        module._original_forward = hook.fn_ref.original_forward
    if name == HOOK:
        _let_inside(module)
    _remove(registry, name)
    if module.__dict__.get("_old_forward") is hook.installed:  # accelerate's hooks wrap ours
        module._old_forward, module.forward = module.forward, outer  # type: ignore[assignment]
    elif not registry.hooks and not hook.had_forward:
        module.__dict__.pop("forward", None)
    if not registry.hooks and not hook.had_registry:
        del module._diffusers_hook


def _remove(registry: HookRegistry, name: str) -> None:
    """Remove accelkit's hook from a chain, where diffusers would drop the next hook's forward."""
    place = registry._hook_order.index(name) + 1
    after = registry._fn_refs[place] if place < len(registry._fn_refs) else None
    own = after.forward if after is not None and after.original_forward is not None else None
    registry.remove_hook(name, recurse=False)
    if after is not None and own is not None:
        after.original_forward, after.forward = after.forward, own


def bare(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return a stand-in without accelkit's hooks for each module of ``model``, for copying.

    Stand-ins share weights and all other attributes with their modules, which are not changed:
    another thread may be calling the model. Other libraries' diffusers hooks are left out.
    """
    twins = {module: object.__new__(type(module)) for module in model.modules()}
    for module, twin in twins.items():
        own = dict(module.__dict__)
        own["_modules"] = {
            name: None if child is None else twins[child] for name, child in own["_modules"].items()
        }
        registry = own.pop("_diffusers_hook", None)
        hooks = [] if registry is None else [registry.hooks[name] for name in registry._hook_order]
        if hooks:
            first, last = hooks[0], hooks[-1]
            if first.had_registry:
                own["_diffusers_hook"] = HookRegistry(twin)
            if own.get("_old_forward") is last.installed:  # accelerate's hooks wrap ours
                own["_old_forward"] = first.fn_ref.original_forward
            elif not first.had_forward:
                own.pop("forward", None)
            else:
                own["forward"] = first.fn_ref.original_forward
            compiled = own.get("_compiled_call_impl")
            if isinstance(compiled, Outside):
                own["_compiled_call_impl"] = compiled.compiled
            for name in ("compile", "_initialize_hook", "_infer_parameters"):
                own.pop(name, None)
        elif registry is not None:
            own["_diffusers_hook"] = registry
        twin.__dict__.update(own)
    return twins


def put(module: nn.Module, hook: Hook, name: str = HOOK) -> None:
    """Put a hook on a module, outside of its diffusers hooks and inside of accelerate's.

    A pipeline that offloads its models takes accelerate's hooks off after every call. That restores
    the forward that they were put around, which has to include this hook.
    """
    outer: Any = module.__dict__.get("forward")
    by = getattr(getattr(outer, "func", None), "__module__", "")
    if "_old_forward" in module.__dict__ and by == "accelerate.hooks":
        module.forward = module._old_forward  # type: ignore[assignment]
    else:
        outer = None
    hook.had_forward = "forward" in module.__dict__
    hook.had_registry = "_diffusers_hook" in module.__dict__
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    made: Any = module.forward  # diffusers' partial
    module.forward = _Bound(made.func, *made.args)
    vars(module.forward).update(vars(made))  # among them what inspect.signature reads
    hook.installed, hook.own = module.forward, hook.fn_ref.forward
    if outer is not None:
        module._old_forward, module.forward = module.forward, outer  # type: ignore[assignment]
    if hook.can_be_outside:
        _keep_outside(module, hook)


class _Bound(functools.partial[Any]):
    """A module's forward that stays the same when it is bound to the module again.

    cache-dit, when disabled, binds the forward that it found.
    """

    def __get__(self, instance: Any, owner: Any = None) -> _Bound:
        return self


def parameters(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


class Hook(ModelHook):
    """Base of accelkit's hooks."""

    had_forward = had_registry = False  # whether the module's ``__dict__`` held them before
    installed: Any = None  # the module's forward with this hook
    own: Any = None  # the function that this hook runs in place of the module's forward
    can_be_outside = False  # whether the module may be compiled in place without the hook
    is_outside = False  # whether it is

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def around(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run the module by ``forward``, its own or what it is compiled to."""
        raise NotImplementedError

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replace the module's forward, unless the hook is around its compiled call."""
        forward = self.fn_ref.original_forward
        return forward(*args, **kwargs) if self.is_outside else self.around(forward, args, kwargs)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Make sure that this hook runs; diffusers replaces it on removing a hook inside of it."""
        if torch.compiler.is_compiling():  # a graph is made for the hooks at that time
            return args, kwargs
        if self.fn_ref.forward is not self.own:
            self.fn_ref.original_forward, self.fn_ref.forward = self.fn_ref.forward, self.own
        return args, kwargs


class Outside:
    """A module's compiled call, wrapped in a hook."""

    def __init__(self, hook: Hook, compiled: Any) -> None:
        self.hook = hook
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the hook around its compiled call."""
        return self.hook.around(self.compiled, args, kwargs)


def _keep_outside(module: nn.Module, hook: Hook) -> None:
    """Keep a hook outside of a module's graphs, whether it is compiled already or later."""
    _wrap(module, hook)
    module.compile = functools.partial(_compile, module, hook)  # type: ignore[method-assign]


def _let_inside(module: nn.Module) -> None:
    """Undo :func:`_keep_outside`; a compiled module stays compiled."""
    if "compile" not in module.__dict__:
        return
    del module.__dict__["compile"]
    if isinstance(module._compiled_call_impl, Outside):
        module._compiled_call_impl = module._compiled_call_impl.compiled


def _compile(module: nn.Module, hook: Hook, *args: Any, **kwargs: Any) -> None:
    type(module).compile(module, *args, **kwargs)
    _wrap(module, hook)


def _wrap(module: nn.Module, hook: Hook) -> None:
    if module._compiled_call_impl is not None:
        module._compiled_call_impl = Outside(hook, module._compiled_call_impl)
        hook.is_outside = True
