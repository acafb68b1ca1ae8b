"""What other libraries put on a model, and which of it a schedule cannot be combined with.

Caches decide from call to call what is run, as a schedule does. One inside of a block works under a
schedule: a block that is skipped is not called, and keeps what it had. Those that do not are caches
of what all blocks add, which differs with the depth; those that take every block to be called at
every step; and those that keep what an attention returned for tokens that were merged, and would
give it to others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError
from accelkit.schedule import Schedule

OURS = "accelkit"
"""What the names of accelkit's own hooks begin with."""

_CACHES = {  # by what the names of diffusers' hooks begin with
    "fbc_": "FirstBlockCache",
    "mag_cache_": "MagCache",
    "sea_cache_": "SeaCache",
    "faster_cache_": "FasterCache",
    "taylorseer_cache": "TaylorSeer",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
}
_OF_ALL_BLOCKS = {"FirstBlockCache", "MagCache", "SeaCache"}


class Watch:
    """Notices caches that are put on a model while a schedule is in force.

    Args:
        backbone: the model.
        schedule: its schedule.
        hooked: modules with a hook of accelkit's. Whatever a schedule cannot be combined with is
            put on one of them too.
    """

    def __init__(self, backbone: Backbone, schedule: Schedule, hooked: Sequence[nn.Module]) -> None:
        self._backbone = backbone
        self._schedule = schedule
        self._orders = [list_of_hooks(module) for module in hooked]
        self._seen: tuple[int, ...] = ()

    def look(self) -> None:
        """Raise as :func:`check` does, at the cost of a few lengths if nothing is new."""
        seen = (_has_cache_dit(self._backbone.model), *map(len, self._orders))
        if seen != self._seen:
            check(self._backbone, self._schedule)
            self._seen = seen


def check(backbone: Backbone, schedule: Schedule) -> None:
    """Raise AccelkitError if something on the model cannot be combined with ``schedule``."""
    if schedule.full:
        return
    for other, reason in _conflicts(backbone, schedule):
        raise AccelkitError(
            f"the schedule {schedule.name or schedule} cannot run with {other}, which {reason}"
        )


def check_mixed(model: nn.Module) -> None:
    """Raise AccelkitError if something keeps states of a batch, which is about to be split."""
    for module in model.modules():
        for name in list_of_hooks(module):
            if module._diffusers_hook.get_hook(name)._is_stateful:  # type: ignore[operator, union-attr]
                raise AccelkitError(
                    f"a batch of mixed depths cannot run with {_cache(name) or name}, which keeps "
                    "states for the batch as a whole; give all of its samples one timestep, or "
                    "disable the cache"
                )


@contextmanager
def sampling_run(model: nn.Module) -> Iterator[None]:
    """Let caches on ``model`` begin a run of sampling, all of whose calls they are to look at.

    Not every pipeline of diffusers does, and a cache's calls fail without. One context is enough
    where guidance is the second half of a call. Without a cache nothing is done.
    """
    if _has_cache_dit(model):
        from cache_dit import refresh_context

        refresh_context(model)
    if not any(_keeps_states(module) for module in model.modules()):
        yield
        return
    from diffusers.hooks import HookRegistry
    from diffusers.models.cache_utils import CacheMixin  # asks nothing of a model but its hooks

    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.reset_stateful_hooks()
    registry._child_registries_cache = None  # of before the cache, maybe
    with CacheMixin.cache_context(model, "cond"):
        yield


def _keeps_states(module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    return registry is not None and any(hook._is_stateful for hook in registry.hooks.values())


def list_of_hooks(module: nn.Module) -> list[str]:
    """Return the names of diffusers' hooks on a module, from the inside out, as they are kept."""
    registry = module.__dict__.get("_diffusers_hook")
    return [] if registry is None else registry._hook_order


def is_ours(name: str) -> bool:
    """Whether a hook of this name is accelkit's own."""
    return name.startswith(OURS)


def watched(module: nn.Module) -> bool:
    """Whether something hooked on a module may look at its states or change them."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or not all(map(is_ours, list_of_hooks(module)))


def foreign(model: nn.Module) -> list[str]:
    """Return the names of diffusers' hooks on a model or in it that are not accelkit's."""
    names = dict.fromkeys(name for module in model.modules() for name in list_of_hooks(module))
    return [_cache(name) or name for name in names if not is_ours(name)]


def _conflicts(backbone: Backbone, schedule: Schedule) -> Iterator[tuple[str, str]]:
    model, skips = backbone.model, schedule.depths[0] < schedule.layers
    if _has_cache_dit(model):
        yield "cache-dit", "exchanges its blocks; call cache_dit.disable_cache or load it anew"
    found = set(foreign(model))
    for cache in sorted(found & _OF_ALL_BLOCKS) if skips else ():
        yield cache, "keeps what all blocks add, and that differs with the depth; disable the cache"
    if "FasterCache" in found and len(schedule.depths) > 1:
        yield "FasterCache", "needs every block from the first step on; keep one depth (uniform:K)"
    if skips and any("TaylorSeer" in _caches(list_of_hooks(b)) for b in backbone.all_blocks):
        yield "TaylorSeer on whole blocks", "counts their calls; put it on attentions alone"
    merging = [m for ms in backbone.attentions() for m in ms] if schedule.merges else []
    for cache in [c for module in merging for c in _caches(inside(list_of_hooks(module)))]:
        yield cache, "would keep what attention returns for merged tokens; enable it afterwards"


def _caches(names: list[str]) -> list[str]:
    return [cache for name in names if (cache := _cache(name))]


def inside(names: list[str]) -> list[str]:
    """Return those of a module's hooks that are, or would come to lie, inside of accelkit's."""
    ours = [place for place, name in enumerate(names) if is_ours(name)]
    return names[: ours[0]] if ours else names


def _cache(hook: str) -> str | None:
    return next((cache for start, cache in _CACHES.items() if hook.startswith(start)), None)


def _has_cache_dit(model: nn.Module) -> bool:
    return bool(model.__dict__.get("_is_cached"))
