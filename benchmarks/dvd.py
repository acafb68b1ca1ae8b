"""Depth-varying diffusion trained from scratch on the digits, as in table 6 of its paper.

Every row is a DiT of 12 blocks, as DiT-S and -B have, and of the built-in model's width, trained
for the same number of steps from the same weights on the same batches: at full depth, on the
partition alone, and with simultaneous supervision besides. A network that was trained already is
not trained again, so that several processes can share the training before one measures all.
"""

import json
from pathlib import Path
from typing import Any

from diffusers import DiTPipeline

from accelkit.artifact import from_pretrained
from accelkit.bench.compare import Variant, Work, compare, reference_moments
from accelkit.data.latents import encode_latents
from accelkit.data.sources import iter_images, open_source
from accelkit.jobs.fresh import ModelConfig, fresh_pipeline
from accelkit.metrics.features import extractor
from accelkit.sample.generate import Sampling
from accelkit.schedule import Schedule
from accelkit.train.config import TrainConfig
from accelkit.train.loop import Progress, Watch, make_accelerator, train
from accelkit.train.rundir import RunDirectory
from benchmarks.common import parser, record

LAYERS = 12
ROWS = {
    "baseline": ("full", 0.0),
    "DvD-2P": ("dvd-2p", 0.0),
    "DvD-2P, supervised": ("dvd-2p", 1.0),
    "DvD-4P": ("dvd-4p", 0.0),
    "DvD-4P, supervised": ("dvd-4p", 1.0),
}


def trained(name: str, seed: int, steps: int, batch: int, folder: Path) -> dict[str, Any]:
    """Train a row unless its pipeline lies in ``folder``; return its settings."""
    done = folder / "training.json"
    if done.exists():
        return json.loads(done.read_text())
    schedule, weight = ROWS[name]
    images, builtin = open_source("digits"), from_pretrained("builtin")
    pipe = fresh_pipeline(ModelConfig(layers=LAYERS), builtin.vae, images.classes, seed)
    config = TrainConfig(
        steps=steps,
        batch_size=batch,
        learning_rate=1e-3,
        lr_schedule="cosine",
        lr_warmup_steps=min(100, steps // 10),
        ema_decay=0.99,
        intermediate_weight=weight,
        freeze_time_embedder=False,
        seed=seed,
    )
    run = RunDirectory(folder / "run")
    run.open({"row": name}, resume=False, overwrite=True, free=frozenset())

    def note(progress: Progress) -> None:
        if progress.step % 100 == 0:
            print(
                f"{name}, seed {seed}: step {progress.step}, loss {progress.loss:.4f}", flush=True
            )

    train(
        pipe.transformer,
        pipe.scheduler,
        Schedule.parse(schedule, LAYERS),
        encode_latents(images, pipe.vae, size=32),
        config,
        run,
        make_accelerator(config),
        Watch(on_step=note),
    )
    figures = {"train": config.to_dict()}
    pipe.save_pretrained(folder / "pipeline")
    done.write_text(json.dumps(figures))
    return figures


def main() -> None:
    options = parser(__doc__, rounds=0)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--images", type=int, default=1000)
    options.add_argument("--work", type=Path, default=Path("runs/dvd"), help="trained networks")
    options.add_argument("--train-only", action="store_true")
    given = options.parse_args()
    cells = {(name, seed): given.work / f"{name}-{seed}" for seed in given.seeds for name in ROWS}
    figures = {
        (name, seed): trained(name, seed, given.steps, given.batch_size, folder)
        for (name, seed), folder in cells.items()
    }
    if given.train_only:
        return
    variants = [
        Variant(
            DiTPipeline.from_pretrained(folder / "pipeline"), Schedule.parse(ROWS[name][0], LAYERS)
        )
        for (name, _), folder in cells.items()
    ]
    images, features = open_source("digits"), extractor("digits")
    reference = reference_moments((b for _, b in iter_images(images, 32, 256)), features)
    work = Work(given.images, 250, Sampling("ddim", 50), tuple(range(10)))
    rows = compare(variants, work, features, reference)
    results = [
        {"row": name, "seed": seed, **row, **figures[name, seed]}
        for (name, seed), row in zip(cells, rows, strict=True)
    ]
    protocol = {"data": "digits", "sampler": "ddim:50", "guidance": 1, "images": given.images}
    record("benchmarks.dvd", protocol, {"rows": results}, given.output)


if __name__ == "__main__":
    main()
