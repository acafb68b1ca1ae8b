"""Caches of other libraries that a comparison can put on a model, by name.

They run on a model's own modules: what hangs on a block keeps accelkit's fused forward off it. Rows
of full depth and of schedules are like them with ``kernels="off"``.

Parameters are the library's own defaults except where a line says why not. Most caches do nothing
at a run's first steps, so they gain least where there are few.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata

from accelkit.bench.baselines import cache_dit, diffusers_caches
from accelkit.bench.baselines.restored import restored
from accelkit.bench.baselines.target import Target, Unavailable, cannot_run
from accelkit.errors import AccelkitError
from accelkit.runtime import conflicts

Value = float | int | str


@dataclass(frozen=True)
class Option:
    """A parameter of a cache, written behind its name and a colon.

    Attributes:
        name: of the argument that it is.
        default: where it is not written.
        least: numbers are at least this, and whole if the default is; None for words.
        words: those that may be written.
    """

    name: str
    default: Value
    least: float | None = None
    words: tuple[str, ...] = ()

    def read(self, text: str, cache: str) -> Value:
        """Return what is written behind the name of a cache; AccelkitError if it cannot be."""
        if text in self.words:
            return text
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            value = type(self.default)(text)
            if self.least is not None and self.least <= float(value) < math.inf:
                return value
        expected = f"one of {', '.join(self.words)}"
        if self.least is not None:
            whole = "whole " if isinstance(self.default, int) else ""
            expected = f"a {whole}number from {self.least:g} on"
        raise AccelkitError(f"the {self.name} of {cache} is {expected}, got {text!r}")


@dataclass(frozen=True)
class Cache:
    """A cache of another library.

    Attributes:
        title: its name in that library.
        put: puts it on a target, given its options by name.
        options: its parameters, in the order in which they are written.
        hook: the name of the hook without which it does nothing; None for one without.
    """

    title: str
    put: Callable[..., None]
    options: tuple[Option, ...]
    hook: str | None = None

    def read(self, texts: list[str]) -> dict[str, Value]:
        """Return all options from what is written behind the name; AccelkitError if it cannot."""
        if len(texts) > len(self.options):
            known = ", ".join(option.name for option in self.options)
            raise AccelkitError(f"{self.title} takes {known}, got {':'.join(texts)!r}")
        given = {
            o.name: o.read(text, self.title) for o, text in zip(self.options, texts, strict=False)
        }
        return {option.name: option.default for option in self.options} | given


@contextmanager
def cached(target: Target, name: str, options: dict[str, Value]) -> Iterator[None]:
    """Run a target's network with a cache while entered, and leave it as it was.

    Images are to be made by :func:`accelkit.sample.generate.generate`, which starts a run of the
    cache with every batch.

    Args:
        target: what to put it on.
        name: a key of :data:`BASELINES`.
        options: all of its parameters.

    Raises:
        Unavailable: it is not installed, or does not know the model.
    """
    cache, model = BASELINES[name], target.model
    with restored(model):
        try:
            with _quiet():
                cache.put(target, **options)
        except AccelkitError:
            raise
        except ImportError as error:
            raise Unavailable(_not_there(name, cache.title, error)) from error
        except Exception as error:  # whatever a library says that does not know the model
            raise cannot_run(cache.title, model, error) from error
        if cache.hook and not any(
            cache.hook in conflicts.list_of_hooks(m) for m in model.modules()
        ):
            raise Unavailable(
                f"{cache.title} finds nothing in this {type(model).__name__} that it could keep"
            )
        del target  # what is compiled keeps the cache, which must not keep the pipeline
        yield


def _not_there(name: str, title: str, error: ImportError) -> str:
    if name == "cache-dit":
        if isinstance(error, ModuleNotFoundError) and error.name == "cache_dit":
            return f"{name} is not installed; pip install 'accelkit[bench]'"
        return f"{name} cannot be imported ({' '.join(str(error).split())})"
    return f"diffusers {metadata.version('diffusers')} has no {title}; install a later one"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from telling at every batch what they do."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


BASELINES: dict[str, Cache] = {
    "first_block_cache": Cache(
        "FirstBlockCache",
        diffusers_caches.first_block_cache,
        (Option("threshold", 0.05, 0),),
        "fbc_leader_block_hook",
    ),
    "faster_cache": Cache(
        "FasterCache",
        diffusers_caches.faster_cache,
        (Option("interval", 2, 2),),
        "faster_cache_block",
    ),
    "pab": Cache(
        "PyramidAttentionBroadcast",
        diffusers_caches.pab,
        (Option("interval", 2, 2),),  # what the library takes if none is given
        "pyramid_attention_broadcast",
    ),
    "taylorseer": Cache(
        "TaylorSeer",
        diffusers_caches.taylorseer,
        (
            Option("interval", 5, 2),
            # the library's default; whole blocks gain more, and go with no schedule
            Option("what", "attentions", words=("attentions", "blocks")),
        ),
        "taylorseer_cache",
    ),
    "mag_cache": Cache(
        "MagCache",
        diffusers_caches.mag_cache,
        (Option("threshold", 0.06, 0),),
        "mag_cache_block_hook",
    ),
    "cache-dit": Cache("cache-dit", cache_dit.cache_dit, (Option("threshold", 0.08, 0),)),
}
"""Caches by the name by which a comparison asks for them: diffusers' five, and cache-dit's DBCache.

``first_block_cache:THRESHOLD``, ``faster_cache:INTERVAL``, ``pab:INTERVAL``,
``taylorseer:INTERVAL:WHAT``, ``mag_cache:THRESHOLD``, ``cache-dit:THRESHOLD``."""
