"""Measured saving of a U-ViT at D6, relative to the saving in multiplications.

The folds of its skips are included. Weights are random, since they do not change the time. The
geometry is the paper's U-ViT-S/4 on CelebA.
"""

import copy
from functools import partial

import torch

from accelkit.backbones import backbone_of
from accelkit.cost import ideal_saving
from accelkit.models import UViTPipeline, UViTTransformer2DModel
from accelkit.models.uvit import PUBLISHED
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.vp_sde import VPSDEScheduler
from accelkit.runtime.switch import enable
from accelkit.sample.generate import Sampling, generate
from accelkit.sample.samplers import sampler_for
from accelkit.schedule import Schedule
from benchmarks.common import interleaved, parser, ratio, record


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--model", default="celeba64-s4", choices=PUBLISHED)
    options.add_argument("--steps", type=int, default=10)
    given = options.parse_args()
    torch.manual_seed(0)
    pipe = UViTPipeline(UViTTransformer2DModel(**PUBLISHED[given.model]), VPSDEScheduler())
    pipe.transformer.eval()
    how = Sampling("dpm-fast", given.steps)
    sampler = sampler_for(pipe, "dpm-fast", given.steps)
    levels = NoiseAxis.of(sampler).levels(sampler.timesteps)
    backbone = backbone_of(pipe.transformer)
    tuned = copy.deepcopy(pipe)
    enable(pipe, "full")  # so that both take the same path
    enable(tuned, "D6")
    schedule = Schedule.parse("D6", backbone.depth, backbone.family)
    promised = ideal_saving(pipe.transformer, schedule, levels)
    results = {}
    for batch in (1, 8):
        items, seeds = [None] * batch, list(range(batch))
        work = {
            "full": partial(generate, pipe, items, seeds, how),
            "D6": partial(generate, tuned, items, seeds, how),
        }
        row = ratio(interleaved(work, given.rounds), "D6", "full")
        saving = 1 - row["ratio"]
        row |= {"saving": saving, "promised": promised, "of_promised": saving / promised}
        results[f"batch {batch}"] = row
    protocol = {"model": given.model, "sampler": f"dpm-fast:{given.steps}", "ratio": "D6 / full"}
    record("benchmarks.uvit_saving", protocol, results, given.output)


if __name__ == "__main__":
    main()
