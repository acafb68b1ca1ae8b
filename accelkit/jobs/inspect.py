"""What accelkit sees in a model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import nn

from accelkit.artifact import artifact
from accelkit.artifact.loading import is_alone, open_network, refuse_revision
from accelkit.backbones import Backbone, backbone_of, denoiser_of
from accelkit.cost import cost_of, macs_by_depth, parameters_of
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.runtime.fused import paths
from accelkit.runtime.switch import enabled_on, fitting
from accelkit.schedule import Schedule


def inspect(
    model: str,
    revision: str | None,
    schedule: str | None,
    num_heads: int | None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Return family, class, blocks, parameters, numerics, process and cost per depth.

    ``gmacs_by_depth`` begins at ``least_depth``. Where the cost cannot be counted, ``cost`` says
    why in its place.

    Args:
        model: as :func:`accelkit.from_pretrained` takes it; of a network alone nothing else is
            read.
        revision: of a hub id.
        schedule: whose mean cost is added; default the one in force, if any.
        num_heads: attention heads of an original-layout file of unpublished size.
        variant: of the weights.

    Raises:
        AccelkitError: the model cannot be read, or the schedule does not fit it.
    """
    refuse_revision(model, revision)
    alone = is_alone(model)
    target: Any = (
        open_network(Path(model), num_heads, variant)
        if alone
        else artifact.from_pretrained(
            model, revision=revision, variant=variant, num_heads=num_heads
        )
    )
    network = denoiser_of(target)
    backbone = backbone_of(network)
    scheduler = None if alone else target.scheduler
    state = enabled_on(network)
    seen: dict[str, Any] = {
        "model": model,
        "family": backbone.family,
        "class": type(network).__name__,
        "blocks": backbone.depth,
        "blocks_in_all": len(backbone.all_blocks),
        "least_depth": backbone.least,
        "parameters": sum(p.numel() for p in network.parameters()),
        "block_parameters": _range(backbone.blocks),
        "dtype": str(network.dtype).removeprefix("torch."),
        "noise_axis": NoiseAxis.of(scheduler).kind,
        **backbone.notes(),
    }
    chosen = fitting(schedule, backbone) if schedule else None
    if chosen is None and state is not None:
        chosen = state.schedule
    if chosen is not None:
        seen |= {
            "schedule": " ".join(dict.fromkeys((chosen.name, str(chosen)))).strip(),
            "mean_depth": round(chosen.mean_depth(), 3),
        }
    seen["path_of_blocks"] = _ranges(paths(backbone))
    try:
        seen |= _costs(network, backbone, chosen)
    except AccelkitError as error:
        seen["cost"] = f"not counted: {error}"
    return seen


def _ranges(paths: list[str]) -> str:
    """Say what consecutive blocks have in common: ``0-27 fused``."""
    said, start = [], 0
    for path, group in groupby(paths):
        last = start + len(list(group)) - 1
        said.append(f"{start}-{last} {path}" if last > start else f"{start} {path}")
        start = last + 1
    return "; ".join(said)


def _costs(network: Any, backbone: Backbone, schedule: Schedule | None) -> dict[str, Any]:
    shape = next(iter(backbone.example().values())).shape
    costs: dict[str, Any] = {
        "cost_of_a_sample": " x ".join(map(str, shape[1:])),
        "gmacs_by_depth": [cost / 1e9 for cost in macs_by_depth(network)],
    }
    if schedule is not None:
        costs["mac_saving"] = f"{schedule.ideal_saving(cost=cost_of(network)):.2%}"
        costs["mean_parameters_read"] = round(schedule.mean(parameters_of(network)))
    return costs


def _range(blocks: Iterable[nn.Module]) -> int | list[int]:
    """Parameters of a block, or of the smallest and the largest where they differ."""
    sizes = sorted({sum(p.numel() for p in block.parameters()) for block in blocks})
    return sizes[0] if len(sizes) == 1 else [sizes[0], sizes[-1]]
