"""The published schedules, as data."""

from accelkit.compute import Compute
from accelkit.schedule import SEQUENTIAL, Preset, Schedule, register_presets

DIT_LAYERS = 28
"""Blocks of DiT-XL, for which the DiT schedules were published."""

# Moon et al., "A Simple Early Exiting Framework for Accelerated Sampling in Diffusion Models"
# (ICML 2024), the schedule table of the appendix: blocks run in equal bins of the noise level,
# from data to noise. D6 is given on bins of 0.1. There is no D2 and no D5 for DiT.
_ASE_DIT = {
    "D1": (28, 26, 24, 22, 20),
    "D3": (28, 25, 22, 19, 16),
    "D4": (28, 24, 20, 16, 12),
    "D6": (28, 28, 24, 22, 20, 18, 12, 10, 8, 6),
}


def equal_bins(name: str, depths: tuple[int, ...], layers: int) -> Schedule:
    """Return the schedule of ``depths`` on equally wide intervals of the noise level."""
    edges = tuple((i + 1) / len(depths) for i in range(len(depths)))
    return Schedule(edges, tuple(map(Compute, depths)), layers, name)


def _scaled(name: str, depths: tuple[int, ...], layers: int) -> Preset:
    return lambda depth: equal_bins(name, depths, layers).rescaled(depth)


register_presets(
    SEQUENTIAL, {name: _scaled(name, row, DIT_LAYERS) for name, row in _ASE_DIT.items()}
)
