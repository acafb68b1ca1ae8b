"""Depth-varying diffusion: recursive halving of the noise axis into parts of growing depth."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from accelkit.compute import Compute
from accelkit.errors import AccelkitError
from accelkit.schedule import OptionedPreset, Schedule

PARTS = (2, 3, 4)
"""Numbers of parts that are published."""


def dvd_partition(
    parts: int, layers: int, threshold: float = 0.5, first_depth: int | None = None
) -> Schedule:
    """Return the schedule of depth-varying diffusion (DvD).

    Two intervals to begin with: depth L/2 (halves up) above ``threshold``, all L blocks below it.
    Every further part halves the noisiest interval: its noisier half runs delta blocks fewer than
    it did, the other delta more, where delta = (D' - D) / 2 - 1 for the noisiest two intervals'
    depths D < D' as they are then, rounded down and at least 1. With 12 blocks: 6, 12; 4, 8, 12;
    3, 5, 8, 12 (the paper's tables). The mean depth of an even L is 3L/4, whatever the number of
    parts.

    Args:
        parts: how many, 2 or more.
        layers: blocks that the model's schedules count, L.
        threshold: where the first cut lies on the noise axis, in (0, 1); 0.5 is published.
        first_depth: depth of the noisier of the two intervals to begin with. Default L/2.

    Raises:
        AccelkitError: fewer blocks than 2^(parts - 1), a threshold or depth out of range, or depths
            that would not rise from 1.
    """
    if parts < 2:
        raise AccelkitError(f"depth-varying diffusion has at least 2 parts, got {parts}")
    name = _name(parts, threshold, first_depth)
    if layers < 2 ** (parts - 1):
        fits = [f"dvd-{n}p" for n in PARTS if 2 ** (n - 1) <= layers]
        instead = f"use {fits[-1]}, or " if fits else ""
        raise AccelkitError(
            f"{name} needs at least {2 ** (parts - 1)} blocks to tell {parts} depths apart, this "
            f"model's schedules count {layers}; {instead}give depths at upper edges"
        )
    if not 0 < threshold < 1:
        raise AccelkitError(f"the threshold of {name} lies between 0 and 1, got {threshold}")
    first = (layers + 1) // 2 if first_depth is None else first_depth
    if not 0 < first < layers:
        raise AccelkitError(
            f"the first depth of {name} lies between 1 and {layers - 1}, for a model with {layers} "
            f"counted blocks; got {first}"
        )
    starts, depths = [threshold, 0.0], [first, layers]  # from noise to data
    for _ in range(parts - 2):
        delta = max(1, (depths[1] - depths[0]) // 2 - 1)
        starts.insert(0, (starts[0] + 1) / 2)
        depths[:1] = depths[0] - delta, depths[0] + delta
    if depths[0] < 1 or any(a >= b for a, b in pairwise(depths)):
        raise AccelkitError(
            f"{name} would give {', '.join(map(str, depths))} of {layers} blocks, which do not "
            f"rise from 1; give a first depth nearer to {(layers + 1) // 2}"
        )
    edges = (*reversed(starts[:-1]), 1.0)
    return Schedule(edges, tuple(map(Compute, reversed(depths))), layers, name)


def dvd_preset(parts: int) -> OptionedPreset:
    """Return what reads ``dvd-Np`` with its options, e.g. ``dvd-2p:threshold=0.6,depth=10``."""

    def read(layers: int, options: str) -> Schedule:
        given = {}
        for option in filter(None, options.split(",")):
            key, _, value = (part.strip() for part in option.partition("="))
            if key in given:
                raise AccelkitError(f"dvd-{parts}p is given {key} twice, in {options!r}")
            try:
                given[key] = _OPTIONS[key](value)
            except (KeyError, ValueError):
                raise AccelkitError(
                    f"dvd-{parts}p takes threshold=, a number in (0, 1), and depth=, a whole "
                    f"number of blocks, as in dvd-{parts}p:threshold=0.6,depth=10; got "
                    f"{option.strip()!r}"
                ) from None
        return dvd_partition(parts, layers, given.get("threshold", 0.5), given.get("depth"))

    return read


_OPTIONS: dict[str, Callable[[str], Any]] = {"threshold": float, "depth": int}


def _name(parts: int, threshold: float, first_depth: int | None) -> str:
    options = [f"threshold={threshold}"] if threshold != 0.5 else []
    options += [f"depth={first_depth}"] if first_depth is not None else []
    return f"dvd-{parts}p" + (f":{','.join(options)}" if options else "")
