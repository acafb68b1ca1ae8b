"""What one network call costs at each depth, counted by torch on a copy without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from accelkit.backbones import backbone_of


def macs_by_depth(model: nn.Module) -> list[int]:
    """Return the multiply-accumulates of one call on one sample at depths 1, 2, ..., L.

    Counted with ``torch.utils.flop_counter`` (two flops are one MAC; matrix products, convolutions
    and attention, not element-wise work) at depths 1 and L; every block of a family that is
    registered here costs the same, so the depths between lie on a line.
    """
    depth = backbone_of(model).depth
    first, last = (_macs(model, d) for d in (1, depth))
    if depth == 1:
        return [last]
    block, rest = divmod(last - first, depth - 1)
    assert rest == 0, "blocks of equal shape cost the same"
    return [first + block * i for i in range(depth)]


def _macs(model: Any, depth: int) -> int:
    with torch.device("meta"):
        twin = type(model).from_config(dict(model.config)).eval()
    del backbone_of(twin).blocks[depth:]
    size = model.config.sample_size
    x = torch.empty(1, model.config.in_channels, size, size, device="meta")
    one = torch.zeros(1, dtype=torch.long, device="meta")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        twin(x, timestep=one, class_labels=one)
    return counter.get_total_flops() // 2
