"""The published schedules: tables of depths as data, and the rule of depth-varying diffusion."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from accelkit.compute import Compute
from accelkit.errors import AccelkitError
from accelkit.preset_names import SEQUENTIAL, register_for_all, register_presets
from accelkit.schedule import Schedule

if TYPE_CHECKING:
    from accelkit.preset_names import OptionedPreset, Preset

_Rows = dict[str, tuple[int, ...]]

DIT_LAYERS = 28
"""Blocks of DiT-XL, for which the DiT schedules were published."""

# Moon et al., "A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models"
# (ICML 2024), the schedule table of the appendix: blocks run in equal bins of the noise level,
# from data to noise. D6 is given on bins of 0.1. There is no D2 and no D5 for DiT.
_ASE_DIT: _Rows = {
    "D1": (28, 26, 24, 22, 20),
    "D3": (28, 25, 22, 19, 16),
    "D4": (28, 24, 20, 16, 12),
    "D6": (28, 28, 24, 22, 20, 18, 12, 10, 8, 6),
}

UVIT_LAYERS = 6
"""Decoder blocks of U-ViT-S, for which the U-ViT schedules were published."""

# The same table. Decoder blocks alone are counted; encoder and middle block always run.
_ASE_UVIT: _Rows = {
    "D1": (6, 5, 4, 3, 2),
    "D2": (6, 5, 3, 2, 1),
    "D3": (6, 4, 3, 2, 1),
    "D4": (5, 4, 2, 2, 1),
    "D5": (5, 4, 2, 1, 1),
    "D6": (5, 3, 2, 1, 1),
}


def equal_bins(name: str, depths: tuple[int, ...], layers: int) -> Schedule:
    """Return the schedule of ``depths`` on equally wide intervals of the noise level."""
    edges = tuple((i + 1) / len(depths) for i in range(len(depths)))
    return Schedule(edges, tuple(map(Compute, depths)), layers, name)


def _scaled(name: str, depths: tuple[int, ...], layers: int) -> Preset:
    return lambda depth: equal_bins(name, depths, layers).rescaled(depth)


PARTS = (2, 3, 4)
"""Numbers of parts that are published."""


def dvd_partition(
    parts: int, layers: int, threshold: float = 0.5, first_depth: int | None = None
) -> Schedule:
    """Return the schedule of depth-varying diffusion (DvD).

    The first two intervals run L/2 blocks (halves up) above ``threshold`` and all L below it. Every
    further part halves the noisiest interval: its noisier half runs delta blocks fewer, the other
    half delta more. delta is (D' - D) / 2 - 1, rounded down and at least 1, where D < D' are the
    present depths of the noisiest two intervals. 12 blocks give 6, 12; 4, 8, 12; 3, 5, 8, 12 (the
    paper's tables). The mean depth of an even L is 3L/4 for any number of parts.

    Args:
        parts: number of parts, 2 or more.
        layers: the model's number of counted blocks, L.
        threshold: the first cut on the noise axis, in (0, 1); 0.5 is published.
        first_depth: depth of the noisier of the first two intervals. Default L/2.

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
        raise AccelkitError(f"the threshold of {name} is between 0 and 1, got {threshold}")
    first = (layers + 1) // 2 if first_depth is None else first_depth
    if not 0 < first < layers:
        raise AccelkitError(
            f"the first depth of {name} is between 1 and {layers - 1} for a model with {layers} "
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
    """Return the reader of ``dvd-Np`` and its options, e.g. ``dvd-2p:threshold=0.6,depth=10``."""

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


# The rows that a family takes, the number of blocks they are for, and the least depth that it can
# run. The decoder of HunyuanDiT has long skips as U-ViT's has. A UNet can skip every counted block.
_FAMILIES: dict[str, tuple[_Rows, int, int]] = {
    SEQUENTIAL: (_ASE_DIT, DIT_LAYERS, 1),
    "uvit": (_ASE_UVIT, UVIT_LAYERS, 0),
    "hunyuan": (_ASE_UVIT, UVIT_LAYERS, 0),
    "unet": (_ASE_DIT, DIT_LAYERS, 0),
}
for _family, (_rows, _layers, _least) in _FAMILIES.items():
    register_presets(
        _family, {name: _scaled(name, row, _layers) for name, row in _rows.items()}, _least
    )
# Depth-varying diffusion cuts any number of blocks, so one rule serves all families.
register_for_all({f"dvd-{parts}p": dvd_preset(parts) for parts in PARTS})


def published_depth(family: str) -> int:
    """Return the number of counted blocks that a family's presets were published for."""
    return _FAMILIES.get(family, _FAMILIES[SEQUENTIAL])[1]
