"""The published schedules, as data."""

from accelkit.compute import Compute
from accelkit.dvd import PARTS, dvd_preset
from accelkit.schedule import SEQUENTIAL, Preset, Schedule, register_for_all, register_presets

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


# Whose rows a family takes, how many blocks they are for, and the least depth that it can run. The
# decoder of HunyuanDiT is one of long skips too; of a UNet nothing has to run that is counted.
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
