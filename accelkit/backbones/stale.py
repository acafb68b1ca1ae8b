"""Whether weights or modules changed since they were looked at.

Folded, joined and tabulated weights are valid for as long as their sources are unchanged. Every
such check reads something cheap and compares it with what the same read gave before: a tensor's
version, which counts writes; its address, which changes when a model is moved or cast; or the parts
of a module and the hooks on it.

Three changes leave no such trace. A write through ``.data``, as by fused optimisers and some
averages of weights, keeps version and address. Tensors made in inference mode have no version. And
the replay of a captured graph writes without counting. Where one of these has to be expected,
values have to be compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

_WATCHED = ("forward", "processor", "training", "_compiled_call_impl")


class Seen:
    """What was read from some objects, kept so that a later read can be compared with it.

    Args:
        read: takes one element of each of ``objects``.
        objects: iterables of the same length. Their elements are kept: as long as they are, no new
            object can take the identity of one of them.
        identity: compare results by identity rather than equality.
    """

    def __init__(
        self, read: Callable[..., Any], *objects: Iterable[Any], identity: bool = False
    ) -> None:
        self._read, self._identity = read, identity
        self._objects = [list(each) for each in objects]
        self._values = list(map(read, *self._objects))

    def same(self) -> bool:
        """Whether the read gives the same results now."""
        now = map(self._read, *self._objects)
        if self._identity:
            return all(map(is_, now, self._values))
        return list(now) == self._values

    def of(self, objects: Sequence[Any]) -> bool:
        """Whether these are the very objects that were read."""
        return len(objects) == len(self._values) and all(map(is_, objects, self._objects[0]))


def writes(tensors: Iterable[Tensor]) -> Seen:
    """Watch for writes to tensors, except those made in inference mode, which have no version."""
    return Seen(attrgetter("_version"), [t for t in tensors if not t.is_inference()])


def places(tensors: Iterable[Tensor]) -> Seen:
    """Watch for tensors that are moved to another address."""
    return Seen(Tensor.data_ptr, tensors)


def contents(modules: Iterable[nn.Module], *names: str) -> Seen:
    """Watch for writes to the parameters of these names, and for others in their place.

    A parameter's address may be reused once its memory is free. The identity of a storage is not
    reused while there is a weak reference to it, which does not keep the memory.
    """

    def read(module: nn.Module) -> list[tuple[Any, ...]]:
        tensors: list[Any] = [getattr(module, name) for name in names]
        return [
            (StorageWeakRef(t.untyped_storage()), t.data_ptr(), t._version, t.dtype)
            for t in tensors
        ]

    return Seen(read, modules)


def structure(modules: Iterable[nn.Module]) -> list[Seen]:
    """Watch for other children, parameters or hooks in modules and all modules inside them.

    Also noticed are a ``forward`` put on an instance, as by the hooks of diffusers and accelerate,
    another attention processor, another compiled call, and training begun or ended. Writes to
    parameters are not noticed.
    """
    inside = [each for module in modules for each in module.modules()]
    dicts: list[dict[str, Any]] = []
    keys: list[str] = []
    for module in inside:
        for held, names in (
            (module._modules, list(module._modules)),
            (module._parameters, list(module._parameters)),
            (module.__dict__, _WATCHED),
        ):
            dicts += [held] * len(names)
            keys += names
    hooks = [h for module in inside for h in (module._forward_hooks, module._forward_pre_hooks)]
    return [Seen(dict.get, dicts, keys, identity=True), Seen(len, hooks)]
