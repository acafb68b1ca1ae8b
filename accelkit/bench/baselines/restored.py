"""Undoes what other libraries change on a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore every module of ``model`` at the end, whatever was changed or raised inside.

    This covers attributes, hooks of PyTorch and of diffusers, and exchanged children. It does not
    cover weights that were written to.
    """
    before = [held for module in model.modules() for held in _held(module)]
    try:
        yield
    finally:
        for container, contents in before:
            _put_back(container, contents)


def _held(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield the containers of a module that can be changed in place, each with a copy."""
    inside = module.__dict__
    yield from _copies(inside)
    if (registry := inside.get("_diffusers_hook")) is not None:
        yield from _copies(registry.__dict__)


def _copies(attributes: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield attributes, dict(attributes)
    for value in attributes.values():
        if type(value) in (dict, OrderedDict, list):  # a config is frozen
            yield value, list(value) if isinstance(value, list) else dict(value)


def _put_back(container: Any, contents: Any) -> None:
    if isinstance(container, list):
        container[:] = contents
        return
    same = container.keys() == contents.keys()
    if not same or any(container[name] is not value for name, value in contents.items()):
        container.clear()
        container.update(contents)
