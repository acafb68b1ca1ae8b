"""What accelkit sees in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelkit import artifact
from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.original import load_original
from accelkit.bench.cost import macs_by_depth
from accelkit.loading import is_original
from accelkit.noise import NoiseAxis
from accelkit.schedule import Schedule
from accelkit.switch import enabled_on


def inspect(
    model: str, revision: str | None, schedule: str | None, num_heads: int | None
) -> dict[str, Any]:
    """Return family, class, blocks, parameters, numerics, process and cost per depth.

    Args:
        model: as :func:`accelkit.from_pretrained` takes it; of an original-layout file the network
            alone is read.
        revision: of a hub id.
        schedule: whose mean cost is added; default the one in force, if any.
        num_heads: attention heads of an original-layout file of unpublished size.

    Raises:
        AccelkitError: the model cannot be read, or the schedule does not fit it.
    """
    alone = is_original(model)
    target: Any = (
        load_original(Path(model), num_heads=num_heads)
        if alone
        else artifact.from_pretrained(model, revision=revision, num_heads=num_heads)
    )
    network = denoiser_of(target)
    backbone = backbone_of(network)
    scheduler = None if alone else target.scheduler
    state = enabled_on(network)
    costs = macs_by_depth(network)
    seen: dict[str, Any] = {
        "model": model,
        "family": backbone.family,
        "class": type(network).__name__,
        "blocks": backbone.depth,
        "parameters": sum(p.numel() for p in network.parameters()),
        "block_parameters": sum(p.numel() for p in backbone.blocks[0].parameters()),
        "dtype": str(network.dtype).removeprefix("torch."),
        "noise_axis": NoiseAxis.of(scheduler).kind,
        **backbone.notes(),
        "gmacs_by_depth": [cost / 1e9 for cost in costs],
    }
    chosen = Schedule.parse(schedule, backbone.depth, backbone.family) if schedule else None
    if chosen is None and state is not None:
        chosen = state.schedule
    if chosen is not None:
        widths = zip((0.0, *chosen.edges), chosen.edges, chosen.computes, strict=False)
        mean = sum((b - a) * costs[c.depth - 1] for a, b, c in widths)
        seen |= {
            "schedule": " ".join(dict.fromkeys((chosen.name, str(chosen)))).strip(),
            "mean_depth": round(chosen.mean_depth(), 3),
            "mac_saving": f"{1 - mean / costs[-1]:.2%}",
        }
    return seen
