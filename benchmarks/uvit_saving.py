"""How much of the saving that its multiplications promise a U-ViT reaches at D6, folds included.

Random weights do for time. The geometry is the paper's U-ViT-S/4 on CelebA.
"""

import torch

from accelkit.backbones import backbone_of
from accelkit.cost import ideal_saving
from accelkit.models import UViTPipeline, UViTTransformer2DModel
from accelkit.models.uvit import PUBLISHED
from accelkit.models.vp_sde import VPSDEScheduler
from accelkit.noise import NoiseAxis
from accelkit.sample.generate import Sampling, generate
from accelkit.sample.samplers import make_sampler
from accelkit.schedule import Schedule
from accelkit.switch import enable
from benchmarks.common import interleaved, parser, ratio, record


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--model", default="celeba64-s4", choices=PUBLISHED)
    options.add_argument("--steps", type=int, default=25)
    given = options.parse_args()
    torch.manual_seed(0)
    pipe = UViTPipeline(UViTTransformer2DModel(**PUBLISHED[given.model]), VPSDEScheduler())
    pipe.transformer.eval()
    how = Sampling("dpm-fast", given.steps)
    sampler = make_sampler("dpm-fast", pipe.scheduler, given.steps)
    levels = NoiseAxis.of(sampler).levels(sampler.timesteps)
    backbone = backbone_of(pipe.transformer)
    results = {}
    for batch in (1, 8):

        def sample(name: str | None, batch: int = batch) -> None:
            items, seeds = [None] * batch, list(range(batch))
            if name is None:
                generate(pipe, items, seeds, how)
                return
            with enable(pipe, name):
                generate(pipe, items, seeds, how)

        names = ["D1", "D4", "D6"]
        work = {n: lambda n=n, run=sample: run(n) for n in names}
        seconds = interleaved({"full": lambda run=sample: run(None), **work}, given.rounds)
        for name in names:
            row = ratio(seconds, name, "full")
            schedule = Schedule.parse(name, backbone.depth, backbone.family)
            promised = ideal_saving(pipe.transformer, schedule, levels)
            row |= {"saving": 1 - row["ratio"], "promised_saving": promised}
            row["of_promised"] = row["saving"] / promised
            results[f"{name}, batch {batch}"] = row
    protocol = {"model": given.model, "sampler": f"dpm-fast:{given.steps}"}
    record("benchmarks.uvit_saving", protocol, results, given.output)


if __name__ == "__main__":
    main()
