"""Caches of other libraries that a comparison can put on a model, by name.

They run on a model's own modules, since accelkit's fused forward does not run hooked blocks. Rows
of full depth and of schedules do the same with ``kernels="off"``.

Parameters are the library's own defaults unless a comment says why not. Most caches do nothing in a
run's first steps, so they gain least in short runs.
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
from accelkit.bench.baselines.trials import Unavailable, cannot_run
from accelkit.errors import AccelkitError
from accelkit.runtime import conflicts
from accelkit.sample.generate import Sampling
from accelkit.subject import Subject

Value = float | int | str


@dataclass(frozen=True)
class Option:
    """A parameter of a cache, written after the cache's name and a colon.

    Attributes:
        name: the argument of the cache's function.
        default: the value if none is written.
        least: the smallest number allowed, whole if the default is; None for words.
        words: the words allowed.
    """

    name: str
    default: Value
    least: float | None = None
    words: tuple[str, ...] = ()

    def read(self, text: str, cache: str) -> Value:
        """Return the value that is written for ``cache``; AccelkitError if it is not allowed."""
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
        put: puts it on a subject, given how images are sampled and its options by name.
        options: its parameters, in the order in which they are written.
        hook: the name of the hook that it adds; None if it adds none.
    """

    title: str
    put: Callable[..., None]
    options: tuple[Option, ...]
    hook: str | None = None

    def read(self, texts: list[str]) -> dict[str, Value]:
        """Return all options, given those written; AccelkitError if one is not allowed."""
        if len(texts) > len(self.options):
            known = ", ".join(option.name for option in self.options)
            raise AccelkitError(f"{self.title} takes {known}, got {':'.join(texts)!r}")
        given = {
            o.name: o.read(text, self.title) for o, text in zip(self.options, texts, strict=False)
        }
        return {option.name: option.default for option in self.options} | given


@contextmanager
def cached(
    subject: Subject, sampling: Sampling, name: str, options: dict[str, Value]
) -> Iterator[None]:
    """Run a network with a cache while entered, and restore it afterwards.

    Make images with :func:`accelkit.sample.generate.generate`, which resets the cache for every
    batch.

    Raises:
        Unavailable: the cache is not installed, or cannot run on the model.
    """
    cache, model = BASELINES[name], subject.model
    with restored(model):
        try:
            with _quiet():
                cache.put(subject, sampling, **options)
        except AccelkitError:
            raise
        except ImportError as error:
            raise Unavailable(_not_there(name, cache.title, error)) from error
        except Exception as error:  # libraries raise anything for a model they do not know
            raise cannot_run(cache.title, model, error) from error
        if cache.hook and not any(
            cache.hook in conflicts.list_of_hooks(m) for m in model.modules()
        ):
            raise Unavailable(
                f"{cache.title} finds nothing to cache in this {type(model).__name__}"
            )
        del subject  # a compiled copy keeps this cache, which must not keep the pipeline
        yield


def _not_there(name: str, title: str, error: ImportError) -> str:
    if name == "cache-dit":
        if isinstance(error, ModuleNotFoundError) and error.name == "cache_dit":
            return f"{name} is not installed; pip install 'accelkit[bench]'"
        return f"{name} cannot be imported ({' '.join(str(error).split())})"
    return f"diffusers {metadata.version('diffusers')} has no {title}; install a later one"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notices that libraries print for every batch."""
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
            # the library's default; whole blocks gain more but cannot run with a schedule
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
"""Caches by the name that a comparison knows them by: diffusers' five, and cache-dit's DBCache.

``first_block_cache:THRESHOLD``, ``faster_cache:INTERVAL``, ``pab:INTERVAL``,
``taylorseer:INTERVAL:WHAT``, ``mag_cache:THRESHOLD``, ``cache-dit:THRESHOLD``."""
