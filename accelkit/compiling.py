"""Keeps hooks outside of the graphs of modules that are compiled in place.

``module.compile()``, which diffusers' ``compile_repeated_blocks`` calls for every block, compiles
a module's call with the hooks on it. What a hook decides would be part of the graph: a model's
would break it at the timestep, and a block's would make one for every block and depth.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

from torch import nn


class Hook(Protocol):
    """What is asked of a hook that stays outside.

    Attributes:
        is_outside: told to it, as its module's graph runs through it all the same.
    """

    is_outside: bool

    def outside(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """Run the module by ``forward``, in whose graph the hook is to do nothing."""


class Outside:
    """What a module runs in place of its compiled call."""

    def __init__(self, hook: Hook, compiled: Any) -> None:
        self.hook = hook
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, the hook around its compiled call."""
        return self.hook.outside(self.compiled, args, kwargs)


def keep_outside(module: nn.Module, hook: Hook) -> None:
    """Keep a hook outside of the graphs of a module that is compiled, or will be."""
    _wrap(module, hook)
    module.compile = functools.partial(_compile, module, hook)  # type: ignore[method-assign]


def let_in(module: nn.Module) -> None:
    """Undo :func:`keep_outside`; what is compiled stays so."""
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
