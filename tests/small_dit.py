"""Calls of the small DiT, and their outputs when the network is cut by hand."""

import copy

import torch

SCHEDULE = "6@0.3,4@0.6,2@1"  # of the six blocks of `dit`
DEPTH_OF = {100: 6, 299: 6, 300: 4, 500: 4, 600: 2, 900: 2}
MIXED = [900, 100, 500, 100]  # depths 2, 6, 4, 6


def inputs(timesteps, seed=1):
    """Latents, timesteps and labels, one row for each timestep."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(timesteps), 4, 8, 8, generator=draw)
    labels = torch.randint(1000, (len(timesteps),), generator=draw)
    return latents, torch.tensor(timesteps), labels


@torch.no_grad()
def run(model, latents, timesteps, labels):
    return model(latents, timestep=timesteps, class_labels=labels).sample


def truncated(model, depth):
    """The network with its first ``depth`` blocks, cut by hand."""
    short = copy.deepcopy(model)
    short.transformer_blocks = short.transformer_blocks[:depth]
    return short


def by_hand(model, latents, timesteps, labels):
    """Every row on its own through the network cut to its depth."""
    cut = {depth: truncated(model, depth) for depth in set(DEPTH_OF.values())}
    rows = zip(latents.split(1), timesteps.split(1), labels.split(1), strict=True)
    return torch.cat([run(cut[DEPTH_OF[int(t)]], x, t, y) for x, t, y in rows])


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
