"""Time of the 50 calls of a DDIM run, and of a guided run, for a DiT of random weights on a GPU.

The default geometry is DiT-XL/2's at 256 pixels. The ways of running it take turns, at full depth
and on a schedule: diffusers' own modules, torch.compile of the whole model, the fused forward, and
the fused forward captured as graphs.
"""

import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import torch

import accelkit
from accelkit.schedule import Schedule
from benchmarks.common import interleaved, parser, ratio, record

WAYS = ("own", "torch.compile", "fused", "graphs")


def network(layers: int, heads: int, head_dim: int) -> Any:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=layers, out_channels=8
    ).eval()


def prepared(model: Any, way: str, schedule: str, mode: str) -> Any:
    """Return a copy of the model that runs a schedule in one of the ways."""
    twin = copy.deepcopy(model)
    accelkit.enable(twin, schedule, kernels="auto" if way in ("fused", "graphs") else "off")
    if way == "graphs":
        accelkit.compile(twin, mode)
    return torch.compile(twin) if way == "torch.compile" else twin


def calls(model: Any, batch: int, steps: torch.Tensor) -> Callable[[], None]:
    """Return a function that makes all calls of a run on one batch, half of it without labels."""
    device, dtype = steps.device, next(model.parameters()).dtype
    size = model.config.sample_size
    sample = torch.randn(batch, 4, size, size, device=device, dtype=dtype)
    labels = torch.arange(batch, device=device) % 1000
    labels[(batch + 1) // 2 :] = 1000

    def run() -> None:
        for step in steps:
            model(sample, timestep=step.expand(batch), class_labels=labels, return_dict=False)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def pipeline(model: Any, device: str, dtype: torch.dtype) -> Any:
    """Return the DiTPipeline of a model, with an autoencoder of Stable Diffusion's size."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).to(device, dtype)
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    options = parser(__doc__, rounds=10)
    options.add_argument("--device", default="cuda")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--layers", type=int, default=28)
    options.add_argument("--heads", type=int, default=16)
    options.add_argument("--head-dim", type=int, default=72)
    options.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    options.add_argument("--schedule", default="D4")
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--mode", default="graphs", help="mode of accelkit.compile")
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    given = options.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("benchmarks.denoising needs a CUDA device, and there is none\n")
        raise SystemExit(2)
    dtype = getattr(torch, given.dtype)
    model = network(given.layers, given.heads, given.head_dim).to(given.device, dtype)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(given.steps, device=given.device)
    schedule = Schedule.parse(given.schedule, given.layers)
    results: dict[str, Any] = {
        "ideal_saving": schedule.ideal_saving([t / 1000 for t in scheduler.timesteps.tolist()])
    }
    names = ["full", given.schedule]
    with torch.no_grad():
        for batch in given.batches:
            work = {
                f"{way}, {name}": calls(
                    prepared(model, way, name, given.mode), batch, scheduler.timesteps
                )
                for way in given.ways
                for name in names
            }
            seconds = interleaved(work, given.rounds)
            for name in list(work)[1:]:
                results[f"{name}, batch {batch}"] = ratio(seconds, f"{given.ways[0]}, full", name)
            for way in given.ways:
                pairs = zip(*(seconds[f"{way}, {name}"] for name in reversed(names)), strict=True)
                saved = statistics.median(1 - short / full for short, full in pairs)
                results[f"{way}, batch {batch}, saved by {given.schedule}"] = saved
        whole = {
            "own, full": pipeline(prepared(model, "own", "full", ""), given.device, dtype),
            f"{given.ways[-1]}, {given.schedule}": pipeline(
                prepared(model, given.ways[-1], given.schedule, given.mode), given.device, dtype
            ),
        }

        def images(pipe: Any) -> object:
            draw = torch.Generator(given.device).manual_seed(0)
            count = max(1, given.batches[0])
            return pipe(
                list(range(count)), 4.0, generator=draw, num_inference_steps=given.steps
            ).images  # on the CPU, hence finished

        seconds = interleaved({n: lambda p=p: images(p) for n, p in whole.items()}, given.rounds)
        results[f"whole guided run, {given.batches[0]} images"] = ratio(seconds, *whole)
    protocol = {
        "ratio": f"seconds of {given.ways[0]}, full / seconds",
        "model": f"{given.layers} blocks, width {given.heads * given.head_dim}, {given.dtype}",
        "sampler": f"ddim:{given.steps}",
    }
    record("benchmarks.denoising", protocol, results, given.output)


if __name__ == "__main__":
    main()
