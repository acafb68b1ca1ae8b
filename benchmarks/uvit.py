"""A U-ViT of the digits at every schedule it was fine-tuned to, token merging beside (tables 4-8).

``em`` swaps in the continuous VP SDE. It takes what two recipes leave::

    accelkit train --recipe recipes/digits_uvit.toml -o runs/digits-uvit
    for d in D1 D2 D3 D4 D5 D6; do
        accelkit finetune --recipe recipes/digits_uvit_finetune.toml --schedule $d -o runs/uvit-$d
    done
"""

from pathlib import Path
from typing import Any

from accelkit.backbones import backbone_of, denoiser_of
from accelkit.bench.compare import Variant, Work, compare, reference_moments
from accelkit.data.sources import iter_images, open_source
from accelkit.jobs.common import Source, open_unscheduled
from accelkit.metrics.features import extractor
from accelkit.models.vp_sde import VPSDEEulerMaruyamaScheduler
from accelkit.sample.generate import Sampling
from accelkit.schedule import Schedule, preset_names
from benchmarks.common import parser, record


def main() -> None:
    options = parser(__doc__, rounds=0)
    options.add_argument("--runs", type=Path, default=Path("runs"))
    options.add_argument("--images", type=int, default=500)
    options.add_argument("--samplers", nargs="+", default=["dpm-fast:50", "dpm-fast:25"])
    options.add_argument("--merging", nargs="*", default=["tome:0.25:R2", "tome:0.5:R2"])
    given = options.parse_args()
    base = open_unscheduled(Source(model=str(given.runs / "digits-uvit" / "pipeline")))
    backbone = backbone_of(denoiser_of(base))

    def parsed(text: str) -> Schedule:
        return Schedule.parse(text, backbone.depth, backbone.family)

    variants = [Variant(base, parsed("full"))]
    for name in preset_names(backbone.family):
        variants.append(Variant(base, parsed(name)))
        tuned = open_unscheduled(Source(model=str(given.runs / f"uvit-{name}")))
        variants.append(Variant(tuned, parsed(name), tuned=True))
    variants += [Variant(base, parsed(text)) for text in given.merging]
    images, features = open_source("digits"), extractor("digits")
    reference = reference_moments((b for _, b in iter_images(images, 32, 256)), features)
    results: dict[str, list[dict[str, Any]]] = {}
    for sampler in given.samplers:
        name, steps = sampler.split(":")
        if name == "em":  # the continuous process, of which the digits' is a discretisation
            for variant in variants:
                variant.pipe.scheduler = VPSDEEulerMaruyamaScheduler()
        work = Work(given.images, 250, Sampling(name, int(steps)), tuple(range(10)))
        results[sampler] = compare(variants, work, features, reference)
    protocol = {"data": "digits", "guidance": 1, "images": given.images}
    record("benchmarks.uvit", protocol, results, given.output)


if __name__ == "__main__":
    main()
