"""Caches that other libraries put on a model, and which of them conflict with a schedule.

A cache decides at each call what is run, as a schedule does. A cache inside a block works under a
schedule: a skipped block is not called, and the cache keeps its contents. Three kinds conflict: a
cache of the sum of all blocks, which differs with the depth; a cache that expects every block to be
called at every step; and a cache of an attention's output, where merged tokens would be reused for
other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError
from accelkit.schedule import Schedule

_CACHES = {  # by the prefix of the names of diffusers' hooks
    "fbc_": "FirstBlockCache",
    "mag_cache_": "MagCache",
    "sea_cache_": "SeaCache",
    "faster_cache_": "FasterCache",
    "taylorseer_cache": "TaylorSeer",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
}
_OF_ALL_BLOCKS = {"FirstBlockCache", "MagCache", "SeaCache"}


class CacheWatch:
    """Notices caches that are put on a model or its blocks while a schedule is in force."""

    def __init__(self, backbone: Backbone, schedule: Schedule) -> None:
        self._backbone = backbone
        self._schedule = schedule
        modules = (backbone.model, *backbone.all_blocks)
        self._orders = [order for order in map(list_of_hooks, modules) if order]
        self._seen: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise as :func:`check` does. Compares a few lengths if nothing is new."""
        seen = (_has_cache_dit(self._backbone.model), *map(len, self._orders))
        if seen != self._seen:
            check(self._backbone, self._schedule)
            self._seen = seen


def check(backbone: Backbone, schedule: Schedule) -> None:
    """Raise AccelkitError if something on the model conflicts with ``schedule``."""
    if schedule.full:
        return
    for other, reason in _conflicts(backbone, schedule):
        raise AccelkitError(
            f"the schedule {schedule.name or schedule} cannot run with {other}, which {reason}"
        )


def check_mixed(model: nn.Module) -> None:
    """Raise AccelkitError if a hook keeps states for a batch that is about to be split."""
    for name in _stateful(model):
        raise AccelkitError(
            f"a batch of mixed depths cannot run with {_cache(name) or name}, which keeps states "
            "for the batch as a whole; give all of its samples one timestep, or disable the cache"
        )


@contextmanager
def sampling_run(model: nn.Module) -> Iterator[None]:
    """Start a sampling run for the caches on ``model``; does nothing without a cache.

    Not every diffusers pipeline does this, and a cache's calls fail without it. One context is
    enough where guidance is the second half of a batch.
    """
    if _has_cache_dit(model):
        from cache_dit import refresh_context

        refresh_context(model)
    if not any(_stateful(model)):
        yield
        return
    from diffusers.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin  # uses a model's hooks only

    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.reset_stateful_hooks()
    registry._child_registries_cache = None  # may predate the cache
    with CacheMixin.cache_context(model, "cond"):
        yield


def _stateful(model: nn.Module) -> Iterator[str]:
    """Yield the names of diffusers' hooks on a model and its modules that keep states."""
    for module in model.modules():
        for name in list_of_hooks(module):
            if module._diffusers_hook.hooks[name]._is_stateful:  # type: ignore[index, union-attr]
                yield name


def list_of_hooks(module: nn.Module) -> list[str]:
    """Return the names of diffusers' hooks on a module, innermost first, as the live list."""
    registry = module.__dict__.get("_diffusers_hook")
    return [] if registry is None else registry._hook_order


def is_ours(name: str) -> bool:
    """Return whether a hook of this name is accelkit's own."""
    return name.startswith("accelkit")


def watched(module: nn.Module) -> bool:
    """Return whether a hook on a module may read or change its states."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or not all(map(is_ours, list_of_hooks(module)))


def foreign(model: nn.Module) -> list[str]:
    """Return the names of diffusers' hooks on a model and its modules that are not accelkit's."""
    names = dict.fromkeys(name for module in model.modules() for name in list_of_hooks(module))
    return [_cache(name) or name for name in names if not is_ours(name)]


def _conflicts(backbone: Backbone, schedule: Schedule) -> Iterator[tuple[str, str]]:
    model, skips = backbone.model, schedule.depths[0] < schedule.layers
    if _has_cache_dit(model):
        yield "cache-dit", "exchanges its blocks; call cache_dit.disable_cache or load it again"
    found = set(foreign(model))
    for cache in sorted(found & _OF_ALL_BLOCKS) if skips else ():
        yield cache, "keeps what all blocks add, which differs with the depth; disable the cache"
    if "FasterCache" in found and len(schedule.depths) > 1:
        yield "FasterCache", "needs every block from the first step on; use one depth (uniform:K)"
    on_blocks = [_cache(name) for b in backbone.all_blocks for name in list_of_hooks(b)]
    if skips and "TaylorSeer" in on_blocks:
        yield "TaylorSeer on whole blocks", "counts their calls; put it on attentions only"
    merging = [m for ms in backbone.attentions() for m in ms] if schedule.merges else []
    for name in [name for module in merging for name in inside(list_of_hooks(module))]:
        if keeper := _cache(name):
            yield (
                keeper,
                "would keep what attention returns for merged tokens; enable it afterwards",
            )


def inside(names: list[str]) -> list[str]:
    """Return the names of a module's hooks that are, or would be, inside of accelkit's."""
    ours = [place for place, name in enumerate(names) if is_ours(name)]
    return names[: ours[0]] if ours else names


def _cache(hook: str) -> str | None:
    return next((cache for start, cache in _CACHES.items() if hook.startswith(start)), None)


def _has_cache_dit(model: nn.Module) -> bool:
    return bool(model.__dict__.get("_is_cached"))
