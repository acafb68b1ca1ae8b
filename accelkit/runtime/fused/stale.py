"""Notices when modules are no longer as they were looked at."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.runtime import conflicts

_WATCHED = ("forward", "processor", "training", "_compiled_call_impl")


class Watch:
    """What modules are made of and what hangs on them, cheap enough to ask at every call.

    Noticed are children and parameters exchanged, a ``forward`` put on an instance (as the hooks of
    diffusers and accelerate do), hooks of PyTorch's, another attention processor, and training
    begun or ended. Parameters written to are not: whoever uses them sees what was written.

    Args:
        modules: those to watch, with all that is in them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        entries: list[tuple[dict[str, Any], str]] = []
        self._hooks: list[Any] = []
        for module in _all(modules):
            inside = module.__dict__
            entries += [(module._modules, name) for name in module._modules]
            entries += [(module._parameters, name) for name in module._parameters]
            entries += [(inside, name) for name in _WATCHED]
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        self._dicts = [where for where, _ in entries]
        self._names = [name for _, name in entries]
        self._values = [where.get(name) for where, name in entries]
        self._counts = list(map(len, self._hooks))

    def same(self) -> bool:
        """Whether nothing changed since."""
        now = map(dict.get, self._dicts, self._names)
        return all(map(is_, now, self._values)) and list(map(len, self._hooks)) == self._counts


def unusual(modules: Iterable[nn.Module]) -> str | None:
    """Return what hangs on modules, or in them, that only their own forward would run, or None."""
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
        modules: whose weights.
        like: a parameter whose dtype and device the others share.
    """
    parameters = [p for module in _all(modules) for p in module._parameters.values()]
    for parameter in parameters:
        if parameter is None:
            continue
        if parameter.is_meta:
            return "its weights are elsewhere"
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            return f"its weights are of the class {type(parameter.data).__name__}"
        if parameter.is_inference():
            return "its weights were made in inference mode"
        if (parameter.dtype, parameter.device) != (like.dtype, like.device):
            return (
                f"its weights are {parameter.dtype} on {parameter.device}, the first {like.dtype}"
            )
        if not parameter.is_contiguous():
            return "its weights do not lie in one piece"
        if not parameter.is_cuda and parameter.is_shared():
            return "its weights are shared with other processes"
    return None


def mismatch(expected: dict[str, tuple[Any, type | None]]) -> str | None:
    """Return the first of some parts, by name, that is of another type than expected, or None."""
    for name, (part, kind) in expected.items():
        if type(part) is not (type(None) if kind is None else kind):
            wanted = "none" if kind is None else kind.__name__
            found = type(part).__name__
            found = found if found != wanted else f"{type(part).__module__}.{found}"
            return f"{name} is {found}, not {wanted}"
    return None


class Joined:
    """Parameters of several layers behind one another in one storage, so that one product has all.

    They keep their identity and values, are written to in place as before, and are no second copy.

    Args:
        parameters: equal in all dimensions but the first, by which they are joined.

    Attributes:
        whole: all of them as one tensor, without gradients.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        with torch.inference_mode(False), torch.no_grad():  # whose tensors could not be trained
            self.whole = torch.cat([p.data for p in self._parameters])
            lengths = [len(p) for p in self._parameters]
            for parameter, part in zip(self._parameters, self.whole.split(lengths), strict=True):
                parameter.data = part
        self._places = self._addresses()

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._parameters))

    def holds(self) -> bool:
        """Whether all of them still lie there: moving or casting a model takes them apart."""
        return self._addresses() == self._places

    def part(self) -> None:
        """Give each its own storage again."""
        with torch.inference_mode(False), torch.no_grad():
            for parameter, place in zip(self._parameters, self._places, strict=True):
                if parameter.data_ptr() == place:
                    parameter.data = parameter.data.clone()


def _all(modules: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for module in modules:
        yield from module.modules()
