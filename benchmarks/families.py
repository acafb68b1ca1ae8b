"""The overhead of an enabled schedule on a call that runs every block, for every family.

The schedule is ``full``, or one that is shallow at higher noise than the call's. Its overhead does
not depend on the width, and for a wide network it is smaller than the variation between two calls.
So it is measured on narrow networks, called in turns, and compared with a call at width 384, the
smallest that is published.
"""

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch

from accelkit.backbones import backbone_of
from accelkit.models import UViTTransformer2DModel
from accelkit.runtime.switch import enable
from benchmarks.common import interleaved, parser, record

WIDE, NARROW = (6, 64), (2, 16)
"""Heads and their width."""

SIZE = {"sample_size": 32, "in_channels": 4, "patch_size": 2, "num_layers": 8}


def _attention(heads: int, dim: int) -> dict[str, int]:
    return {"num_attention_heads": heads, "attention_head_dim": dim}


NETWORKS: dict[str, Callable[[int, int], Any]] = {
    "DiT": lambda heads, dim: diffusers.DiTTransformer2DModel(
        **_attention(heads, dim), **SIZE, out_channels=8
    ),
    "U-ViT": lambda heads, dim: UViTTransformer2DModel(**_attention(heads, dim), **SIZE),
    "PixArt": lambda heads, dim: diffusers.PixArtTransformer2DModel(
        **_attention(heads, dim),
        **SIZE,
        out_channels=8,
        cross_attention_dim=heads * dim,
        caption_channels=256,
        use_additional_conditions=False,
    ),
    "SD3": lambda heads, dim: diffusers.SD3Transformer2DModel(
        **_attention(heads, dim),
        **SIZE,
        out_channels=4,
        joint_attention_dim=256,
        caption_projection_dim=heads * dim,
        pooled_projection_dim=256,
        pos_embed_max_size=32,
    ),
    "FLUX": lambda heads, dim: diffusers.FluxTransformer2DModel(
        **_attention(heads, dim),
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        axes_dims_rope=tuple(dim * n // 8 for n in (2, 3, 3)),
    ),
    "Sana": lambda heads, dim: diffusers.SanaTransformer2DModel(
        **_attention(heads, dim),
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=dim,
        cross_attention_dim=heads * dim,
        caption_channels=256,
    ),
    "HunyuanDiT": lambda heads, dim: diffusers.HunyuanDiT2DModel(
        **_attention(heads, dim),
        **SIZE,
        hidden_size=heads * dim,
        cross_attention_dim=128,
        cross_attention_dim_t5=128,
        pooled_projection_dim=128,
        text_len=16,
        text_len_t5=16,
    ),
    "Wan": lambda heads, dim: diffusers.WanTransformer3DModel(
        **_attention(heads, dim),
        in_channels=4,
        out_channels=4,
        num_layers=6,
        text_dim=128,
        freq_dim=64,
        ffn_dim=4 * heads * dim,
        rope_max_seq_len=64,
    ),
    "UNet": lambda heads, dim: diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=tuple(n * max(32, heads * dim // 3) for n in (1, 1, 2)),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    "conditional UNet": lambda heads, dim: diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=tuple(n * max(32, heads * dim // 3) for n in (1, 1, 2)),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=heads,
    ),
    "an unknown one (AuraFlow)": lambda heads, dim: diffusers.AuraFlowTransformer2DModel(
        **_attention(heads, dim),
        sample_size=32,
        in_channels=4,
        patch_size=2,
        num_mmdit_layers=2,
        num_single_dit_layers=6,
        joint_attention_dim=128,
        caption_projection_dim=heads * dim,
        out_channels=4,
    ),
}

CROPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "FLUX": {"hidden_states": (slice(None), slice(256)), "img_ids": (slice(256),)},
    "Wan": {"hidden_states": (..., slice(2), slice(32), slice(32))},
}
"""What is kept of inputs that would take seconds a call."""


def rounds_of(family: str, size: tuple[int, int], count: int) -> dict[str, list[float]]:
    """Return seconds of calls at full depth, in turns: plain, with ``full``, with a schedule."""
    torch.manual_seed(0)
    plain = NETWORKS[family](*size).eval()
    backbone = backbone_of(plain)
    call = backbone.example(2, "cpu")
    call |= {name: call[name][kept] for name, kept in CROPS.get(family, {}).items()}
    call["timestep"] = torch.zeros_like(torch.as_tensor(call["timestep"]))
    shallow = max(1, backbone.depth // 2)
    work = {"plain": partial(plain, **call)}
    for name, schedule in (("full", "full"), ("scheduled", f"{backbone.depth}@0.5,{shallow}@1")):
        network = copy.deepcopy(plain)
        enable(network, schedule, scheduler=diffusers.DDIMScheduler(), kernels="off")
        work[name] = partial(network, **call)
    with torch.no_grad():
        return interleaved(work, count)


def main() -> None:
    given = parser(__doc__, rounds=80).parse_args()
    results = {}
    for family in NETWORKS:
        few = rounds_of(family, NARROW, given.rounds)
        plain = statistics.median(rounds_of(family, WIDE, 3)["plain"])
        for name in ("full", "scheduled"):
            pairs = zip(few[name], few["plain"], strict=True)
            added = statistics.median(a - b for a, b in pairs)
            row = {"added_ms": 1e3 * added, "call_ms": 1e3 * plain, "share": added / plain}
            results[f"{family}, {name}"] = row
    protocol = {"share": "added time of a call / time of a plain one of width 384", "batch": 2}
    record("benchmarks.families", protocol, results, given.output)


if __name__ == "__main__":
    main()
