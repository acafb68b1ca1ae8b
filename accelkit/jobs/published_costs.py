"""Counts the costs that a publication states, which takes neither weights nor data."""

from __future__ import annotations

from typing import Any

import torch

from accelkit.backbones import backbone_of
from accelkit.cost import ideal_saving, macs_by_depth
from accelkit.jobs.published import Publication
from accelkit.schedule import Schedule

# DiT works on the latents of Stable Diffusion's autoencoder.
_REDUCTION, _CHANNELS = 8, 4


def network_of(publication: Publication) -> Any:
    """Return the published network on the meta device, without weights."""
    sizes = publication.network
    with torch.device("meta"):
        if "released" in sizes:
            from accelkit.models.uvit import PUBLISHED, UViTTransformer2DModel

            return UViTTransformer2DModel(**PUBLISHED[sizes["released"]])
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            attention_head_dim=sizes["head_dim"],
            in_channels=_CHANNELS,
            out_channels=2 * _CHANNELS,
            sample_size=sizes["image_size"] // _REDUCTION,
            norm_eps=1e-6,
        )


def counted(publication: Publication) -> list[dict[str, Any]]:
    """Return the rows of a publication's cost, each figure with the count next to it.

    A published ``gmacs`` gets a ``gmacs_counted``, and so on. diffusers' DiT embeds timestep and
    label in every block; only the original's single embedding is counted.
    """
    if publication.cost is None:
        return []
    network = network_of(publication)
    backbone = backbone_of(network)
    gmacs = _gmacs(network, attention=publication.cost.attention)
    rows = []
    for published in publication.cost.rows:
        row = dict(published)
        if "depth" in row:
            schedule = Schedule.uniform(row["depth"], backbone.depth)
        else:
            schedule = Schedule.parse(row["method"], backbone.depth, backbone.family)
        if "gmacs" in row:
            row["gmacs_counted"] = schedule.mean(lambda c: gmacs[c.depth - backbone.least])
        if "saving" in row:
            row["saving_counted"] = ideal_saving(network, schedule)
        if "depths" in row:
            row["depths_counted"] = [compute.depth for compute in reversed(schedule.computes)]
        rows.append(row)
    return rows


def _gmacs(network: Any, attention: bool) -> list[float]:
    """Return 10^9 multiply-accumulates of the original network's call, by depth from the least."""
    backbone, config = backbone_of(network), network.config
    width = config.num_attention_heads * config.attention_head_dim
    tokens = (config.sample_size // config.patch_size) ** 2
    products = 0 if attention else 2 * tokens**2 * width
    embedder = 256 * width + width**2 if backbone.family == "dit" else 0
    costs = macs_by_depth(network)
    depths = range(backbone.least, backbone.depth + 1)
    return [(c - d * (products + embedder)) / 1e9 for d, c in zip(depths, costs, strict=True)]
