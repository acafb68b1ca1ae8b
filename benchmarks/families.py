"""What an enabled schedule costs a call that runs every block, on a network of every family.

Two copies of a network are called in turns, one enabled: with ``full``, and with a schedule that is
shallow at higher noise than the call's. Random weights do. What is looked for is below a machine's
noise from one call to the next, so the fastest calls of each are compared beside the medians.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch

from accelkit.backbones import backbone_of
from accelkit.models import UViTTransformer2DModel
from accelkit.switch import enable
from benchmarks.common import interleaved, parser, ratio, record

WIDTH = {"num_attention_heads": 6, "attention_head_dim": 64}
SIZE = {"sample_size": 32, "in_channels": 4, "patch_size": 2, "num_layers": 8}

NETWORKS: dict[str, Callable[[], Any]] = {
    "DiT": lambda: diffusers.DiTTransformer2DModel(**WIDTH, **SIZE, out_channels=8),
    "U-ViT": lambda: UViTTransformer2DModel(**WIDTH, **SIZE),
    "PixArt": lambda: diffusers.PixArtTransformer2DModel(
        **WIDTH,
        **SIZE,
        out_channels=8,
        cross_attention_dim=384,
        caption_channels=256,
        use_additional_conditions=False,
    ),
    "SD3": lambda: diffusers.SD3Transformer2DModel(
        **WIDTH,
        **SIZE,
        out_channels=4,
        joint_attention_dim=256,
        caption_projection_dim=384,
        pooled_projection_dim=256,
        pos_embed_max_size=32,
    ),
    "FLUX": lambda: diffusers.FluxTransformer2DModel(
        **WIDTH,
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
    ),
    "Sana": lambda: diffusers.SanaTransformer2DModel(
        **WIDTH,
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_cross_attention_heads=6,
        cross_attention_head_dim=64,
        cross_attention_dim=384,
        caption_channels=256,
    ),
    "HunyuanDiT": lambda: diffusers.HunyuanDiT2DModel(
        **WIDTH,
        **SIZE,
        hidden_size=384,
        cross_attention_dim=128,
        cross_attention_dim_t5=128,
        pooled_projection_dim=128,
        text_len=16,
        text_len_t5=16,
    ),
    "Wan": lambda: diffusers.WanTransformer3DModel(
        **WIDTH,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        text_dim=128,
        freq_dim=64,
        ffn_dim=1024,
        rope_max_seq_len=64,
    ),
    "UNet": lambda: diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 128, 256),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
}

CROPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "FLUX": {"hidden_states": (slice(None), slice(256)), "img_ids": (slice(256),)},
    "Wan": {"hidden_states": (..., slice(2), slice(32), slice(32))},
}
"""What is kept of inputs that would take seconds a call."""


def main() -> None:
    given = parser(__doc__, rounds=25).parse_args()
    scheduler = diffusers.DDIMScheduler()
    results = {}
    for family, make in NETWORKS.items():
        torch.manual_seed(0)
        plain = make().eval()
        backbone = backbone_of(plain)
        call = backbone.example(2, "cpu")
        call |= {name: call[name][kept] for name, kept in CROPS.get(family, {}).items()}
        call["timestep"] = torch.zeros_like(torch.as_tensor(call["timestep"]))
        shallow = max(1, backbone.depth // 2)
        schedules = {"full": "full", "scheduled": f"{backbone.depth}@0.5,{shallow}@1"}
        work = {"plain": partial(plain, **call)}
        for name, schedule in schedules.items():
            network = copy.deepcopy(plain)
            enable(network, schedule, scheduler=scheduler)
            work[name] = partial(network, **call)
        with torch.no_grad():
            seconds = interleaved(work, given.rounds)
        for name in schedules:
            fastest = min(seconds[name]) / min(seconds["plain"])
            results[f"{family}, {name}"] = {"fastest": fastest, **ratio(seconds, name, "plain")}
    protocol = {"ratio": "call of the enabled network / of the plain one", "batch": 2}
    record("benchmarks.families", protocol, results, given.output)


if __name__ == "__main__":
    main()
