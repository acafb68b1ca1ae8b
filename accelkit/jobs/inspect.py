"""Describes a model: family, blocks, numerics and cost per depth."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import nn

from accelkit.artifact.artifact import open_named
from accelkit.artifact.loading import open_network
from accelkit.artifact.names import named
from accelkit.cost import cost_of, macs_by_depth, parameters_of
from accelkit.errors import AccelkitError
from accelkit.runtime.fused import paths
from accelkit.runtime.switch import enabled_on, fitting
from accelkit.schedule import Schedule
from accelkit.subject import Subject


def inspect(
    model: str,
    revision: str | None,
    schedule: str | None,
    num_heads: int | None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Return family, class, blocks, parameters, numerics, process and cost per depth.

    ``gmacs_by_depth`` begins at ``least_depth``. If the cost cannot be counted, ``cost`` gives the
    reason instead.

    Args:
        model: a name as for :func:`accelkit.from_pretrained`; a network alone is opened without an
            autoencoder.
        revision: revision of a hub id.
        schedule: the schedule to add the mean cost of. Default: the one in force, if any.
        num_heads: attention heads of an original-layout file of unpublished size.
        variant: variant of the weights.

    Raises:
        AccelkitError: the model cannot be read, or the schedule does not fit it.
    """
    found = named(model, revision)
    if found.alone:
        assert found.path is not None
        subject = Subject.of(open_network(found.path, num_heads, variant))
    else:
        subject = open_named(found, variant, num_heads=num_heads)
    network, backbone, state = subject.model, subject.backbone, enabled_on(subject)
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
        "noise_axis": subject.axis.kind,
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
        seen |= _costs(subject, chosen)
    except AccelkitError as error:
        seen["cost"] = f"not counted: {error}"
    return seen


def _ranges(paths: list[str]) -> str:
    """Return the paths of consecutive blocks in words, such as ``0-27 fused``."""
    said, start = [], 0
    for path, group in groupby(paths):
        last = start + len(list(group)) - 1
        said.append(f"{start}-{last} {path}" if last > start else f"{start} {path}")
        start = last + 1
    return "; ".join(said)


def _costs(subject: Subject, schedule: Schedule | None) -> dict[str, Any]:
    shape = next(iter(subject.backbone.example().values())).shape
    costs: dict[str, Any] = {
        "cost_of_a_sample": " x ".join(map(str, shape[1:])),
        "gmacs_by_depth": [cost / 1e9 for cost in macs_by_depth(subject.model)],
    }
    if schedule is not None:
        costs["mac_saving"] = f"{schedule.ideal_saving(cost=cost_of(subject)):.2%}"
        costs["mean_parameters_read"] = round(schedule.mean(parameters_of(subject)))
    return costs


def _range(blocks: Iterable[nn.Module]) -> int | list[int]:
    """Return the parameters of a block, or of the smallest and the largest if they differ."""
    sizes = sorted({sum(p.numel() for p in block.parameters()) for block in blocks})
    return sizes[0] if len(sizes) == 1 else [sizes[0], sizes[-1]]
