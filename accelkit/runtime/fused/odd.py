"""Why a module cannot be fused: something on it, its weights, or its class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from accelkit.runtime import conflicts


def unusual(modules: Iterable[nn.Module]) -> str | None:
    """Return what is on modules, or inside them, that only their own forward would run, or None."""
    for module in _all(modules):
        name = type(module).__name__
        if theirs := [
            hook for hook in conflicts.list_of_hooks(module) if not conflicts.is_ours(hook)
        ]:
            return f"a hook of diffusers ({theirs[0]}) on its {name}"
        if "forward" in module.__dict__ and not conflicts.list_of_hooks(module):
            return f"another forward on its {name}"
        if "_old_forward" in module.__dict__:
            return f"a hook of accelerate on its {name}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a hook on its {name}"
        if module._compiled_call_impl is not None:
            return f"its {name} is compiled"
        if module.training and isinstance(module, nn.Dropout) and module.p > 0:
            return "dropout in training"
    return None


def unfit(modules: Iterable[nn.Module], like: Tensor) -> str | None:
    """Return why the weights of modules cannot be joined with others of their model, or None.

    Args:
        modules: the owners of the weights.
        like: a parameter with the dtype and device of the others.
    """
    parameters = [p for module in _all(modules) for p in module._parameters.values()]
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter.is_meta:
            return "its weights are offloaded"
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            return f"its weights are of the class {type(parameter.data).__name__}"
        if parameter.is_inference():
            return "its weights were made in inference mode"
        if (parameter.dtype, parameter.device) != (like.dtype, like.device):
            return (
                f"its weights are {parameter.dtype} on {parameter.device}, the first {like.dtype}"
            )
        if not parameter.is_contiguous():
            return "its weights are not contiguous"
        if not parameter.is_cuda and parameter.is_shared():
            return "its weights are shared with other processes"
    return None


def mismatch(expected: dict[str, tuple[Any, type | None]]) -> str | None:
    """Return which part is not of the expected type, or None.

    Args:
        expected: a part and its type, by the part's name; the type None stands for no part.
    """
    for name, (part, kind) in expected.items():
        if type(part) is not (type(None) if kind is None else kind):
            wanted = "none" if kind is None else kind.__name__
            found = type(part).__name__
            found = found if found != wanted else f"{type(part).__module__}.{found}"
            return f"{name} is {found}, not {wanted}"
    return None


def _all(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for module in modules:
        yield from module.modules()
