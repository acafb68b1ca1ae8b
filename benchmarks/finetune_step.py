"""Cost of a fine-tuning step on each preset, relative to a full-depth step on the same batch."""

from contextlib import ExitStack

import torch

from accelkit.artifact.artifact import from_pretrained
from accelkit.backbones import DiT
from accelkit.noise.schedulers import forward_process
from accelkit.preset_names import preset_names
from accelkit.runtime.switch import enable
from accelkit.runtime.taps import Taps
from accelkit.schedule import Schedule
from accelkit.train.dvd import Supervision
from accelkit.train.objectives import denoising_loss
from benchmarks.common import interleaved, parser, ratio, record

SUPERVISED = ", supervised"


def main() -> None:
    options = parser(__doc__, rounds=15).parse_args()
    pipe = from_pretrained("builtin")
    process = forward_process(pipe.scheduler)
    model = pipe.transformer
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    results = {}
    with DiT(model).training():
        model.train()
        for batch in (64, 128):
            x0, eps = torch.randn(2, batch, 4, 8, 8).unbind()
            t, y = torch.randint(1000, (batch,)), torch.randint(10, (batch,))
            xt = process.add_noise(x0, eps, t)

            def step(name: str, xt=xt, x0=x0, eps=eps, t=t, y=y) -> None:
                schedule = Schedule.parse(name.removesuffix(SUPERVISED))
                with enable(model, schedule) as enabled, ExitStack() as stack:
                    taps = stack.enter_context(Taps(enabled)) if SUPERVISED in name else None
                    output = model(xt, timestep=t, class_labels=y, return_dict=False)[0]
                    losses = denoising_loss(process, output, x0, eps, xt, t)
                    if taps is not None:
                        parts = Supervision(schedule, enabled.axis, process)
                        losses = losses + parts.losses(taps.pop(), x0, eps, t, torch.rand(len(t)))
                    losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad()

            names = ["full", *preset_names(), "dvd-2p", "dvd-4p"]
            names += [name + SUPERVISED for name in names[-2:]]
            seconds = interleaved({n: lambda n=n: step(n) for n in names}, options.rounds)
            for name in names[1:]:
                mean = Schedule.parse(name.removesuffix(SUPERVISED)).mean_depth(t) / 28
                row = {**ratio(seconds, name, "full"), "mean_depth_of_full": mean}
                results[f"{name}, batch {batch}"] = row
    protocol = {"model": "builtin", "ratio": "step with the schedule / step at full depth"}
    record("benchmarks.finetune_step", protocol, results, options.output)


if __name__ == "__main__":
    main()
