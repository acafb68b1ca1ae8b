"""The cost of a network call, against a closed form."""

from itertools import pairwise

import pytest
import torch
from diffusers import DiTTransformer2DModel

from accelkit.bench.cost import macs_by_depth


def dit(**options):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 6, "sample_size": 8}
    channels = {"in_channels": 4, "out_channels": 8}
    return DiTTransformer2DModel(**{**sizes, **channels, **options})


def closed_form(model, depth):
    """MACs of one sample at ``depth`` blocks: matrix products, convolution and attention."""
    c = model.config
    width = c.num_attention_heads * c.attention_head_dim
    tokens = (c.sample_size // c.patch_size) ** 2
    embedder = 256 * width + width**2
    # queries, keys, values, output and an MLP of four times the width, per token
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2 + embedder
    patches = c.patch_size**2 * tokens * width * (c.in_channels + c.out_channels)
    # the exit's modulation asks the first block's embedder once more
    return depth * block + patches + 2 * width**2 + embedder


def test_dit_xl_2_costs_what_is_published():
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
        )
    costs = macs_by_depth(model)
    embedder = 256 * 1152 + 1152**2
    # Peebles and Xie 2023, table 4: 118.64 Gflops, which counts element-wise work as well. The
    # original asks one embedder once; diffusers one a block, and the exit the first one again.
    once = costs[-1] - 28 * embedder
    assert once / 1e9 == pytest.approx(118.62, abs=0.01)
    assert [b - a for a, b in pairwise(costs)] == [costs[1] - costs[0]] * 27
    assert (costs[1] - costs[0] - embedder) / 1e9 == pytest.approx(4.2358, abs=1e-4)
    assert [costs[0], costs[11], costs[27]] == [closed_form(model, d) for d in (1, 12, 28)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 1},
        {"patch_size": 4, "sample_size": 16},
        {"in_channels": 3, "out_channels": 3},
    ],
)
def test_any_dit_costs_its_closed_form(options):
    model = dit(**options)
    depths = range(1, model.config.num_layers + 1)
    assert macs_by_depth(model) == [closed_form(model, d) for d in depths]


def test_counting_leaves_the_model_alone():
    model = dit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    macs_by_depth(model)
    assert len(model.transformer_blocks) == 6
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
