"""One network with a schedule, called from several threads: differing outputs, and throughput.

Outputs of four threads at four noise levels are compared bit for bit with those of one thread.
Throughput is measured with two threads that call one network of width 384 at full depth, on a core
each: with a schedule that is shallow at higher noise, and without one.
"""

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import diffusers
import torch

from accelkit.backbones import Backbone, backbone_of
from accelkit.runtime.switch import enable
from benchmarks.common import interleaved, parser, ratio, record
from benchmarks.families import CROPS, NARROW, NETWORKS, WIDE

FAMILIES = ("SD3", "FLUX", "DiT", "U-ViT", "PixArt", "UNet", "conditional UNet")
MOMENTS = (100, 400, 700, 950)
"""The timestep of each thread."""


def call_at(backbone: Backbone, family: str, timestep: int) -> dict[str, Any]:
    """Return the arguments of a call of two samples."""
    torch.manual_seed(0)
    call = backbone.example(2, "cpu")
    call |= {name: call[name][kept] for name, kept in CROPS.get(family, {}).items()}
    return call | {"timestep": backbone.model_timestep(torch.full((2,), float(timestep)))}


def scheduled(network: Any, kernels: str) -> Any:
    """Return a copy of a network with a depth for each quarter of the noise levels."""
    network = copy.deepcopy(network)
    depth = backbone_of(network).depth
    quarters = [max(1, round(depth * kept)) for kept in (1, 0.75, 0.5, 0.25)]
    schedule = ",".join(f"{d}@{(n + 1) / 4}" for n, d in enumerate(dict.fromkeys(quarters)))
    schedule = schedule.rpartition("@")[0] + "@1"
    enable(network, schedule, scheduler=diffusers.DDIMScheduler(), kernels=kernels)
    return network


@torch.inference_mode()
def outputs(network: Any, call: dict[str, Any], count: int) -> list[torch.Tensor]:
    """Return the outputs of ``count`` calls."""
    return [network(**call)[0] for _ in range(count)]


def differing(family: str, kernels: str, count: int) -> dict[str, int]:
    """Return how many outputs of four threads differ from those of one thread."""
    torch.manual_seed(0)
    network = scheduled(NETWORKS[family](*NARROW).eval(), kernels)
    calls = [call_at(backbone_of(network), family, t) for t in MOMENTS]
    expected = [outputs(network, call, 1)[0] for call in calls]
    each = -(-count // len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        found = list(pool.map(partial(outputs, network, count=each), calls))
    wrong = [
        not torch.equal(output, right)
        for right, thread in zip(expected, found, strict=True)
        for output in thread
    ]
    return {"outputs": len(wrong), "differing": sum(wrong)}


def two_threads(network: Any, call: dict[str, Any], count: int) -> Callable[[], object]:
    """Return a function that calls a network ``count`` times from each of two threads."""

    def run() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: outputs(network, call, count), range(2)))

    return run


def main() -> None:
    options = parser(__doc__, rounds=9)
    options.add_argument("--outputs", type=int, default=2000, help="outputs of each family")
    given = options.parse_args()
    results: dict[str, Any] = {}
    torch.set_num_threads(1)
    usual = sys.getswitchinterval()
    for family in FAMILIES:
        for kernels in ("off", "auto") if family in ("DiT", "U-ViT", "PixArt") else ("off",):
            sys.setswitchinterval(1e-4)  # 5 ms is longer than most of these calls
            name = f"{family}, {'own modules' if kernels == 'off' else 'fused'}"
            results[name] = differing(family, kernels, given.outputs)
        sys.setswitchinterval(usual)
        torch.manual_seed(0)
        plain = NETWORKS[family](*WIDE).eval()
        call = call_at(backbone_of(plain), family, MOMENTS[0])
        work = {
            "plain": two_threads(plain, call, 4),
            "scheduled": two_threads(scheduled(plain, "off"), call, 4),
        }
        row = ratio(interleaved(work, given.rounds), "plain", "scheduled")
        results[f"{family}, own modules"]["throughput"] = row
    protocol = {
        "differing": "outputs of four threads that differ in any bit from those of one thread",
        "throughput": "two threads with a schedule, at full depth / two threads without one",
    }
    record("benchmarks.threads", protocol, results, given.output)


if __name__ == "__main__":
    main()
