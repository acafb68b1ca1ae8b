"""Time of a fused forward against that of diffusers' own modules at the same depth.

Labels differ between rows, and half of the rows have the null class, as under guidance.
"""

import copy
from functools import partial

import diffusers
import torch

from accelkit.artifact.artifact import from_pretrained
from accelkit.runtime.switch import enable
from benchmarks.common import interleaved, parser, ratio, record

ROUNDS = {1: 60, 16: 20, 256: 7}
"""Rounds for each batch size, times ``--rounds``, so that all take about as long."""


def dit_small() -> torch.nn.Module:
    """Return DiT-S/2 for the latents of 256 pixels, with random weights."""
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=12, out_channels=8
    ).eval()


MODELS = {
    "built-in DiT": (lambda: from_pretrained("builtin").transformer, (1, 16, 256)),
    "DiT-S/2": (dit_small, (1, 16)),
}


def main() -> None:
    given = parser(__doc__, rounds=1).parse_args()
    results = {}
    for name, (make, batches) in MODELS.items():
        own = make()
        fused, depth = copy.deepcopy(own), len(own.transformer_blocks)
        for share in (1.0, 0.5):
            kept = round(share * depth)
            cut = copy.deepcopy(own)
            cut.transformer_blocks = cut.transformer_blocks[:kept]
            with enable(fused, f"uniform:{kept}"), torch.no_grad():
                for batch in batches:
                    size, null = own.config.sample_size, own.config.num_embeds_ada_norm
                    labels = torch.arange(batch) % 10
                    labels[(batch + 1) // 2 :] = null
                    call = {
                        "hidden_states": torch.randn(batch, 4, size, size),
                        "timestep": torch.full((batch,), 500),
                        "class_labels": labels,
                    }
                    work = {"own": partial(cut, **call), "fused": partial(fused, **call)}
                    expected, output = (run().sample for run in work.values())
                    row = ratio(interleaved(work, given.rounds * ROUNDS[batch]), "own", "fused")
                    row["relative_error"] = float((output - expected).norm() / expected.norm())
                    results[f"{name}, {kept} blocks, batch {batch}"] = row
    protocol = {"ratio": "seconds of diffusers' own modules / seconds of the fused forward"}
    record("benchmarks.fused", protocol, results, given.output)


if __name__ == "__main__":
    main()
