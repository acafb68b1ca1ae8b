"""Results like those of a benchmark, with times and distances from a simple noisy model."""

import copy

import numpy as np
from PIL import Image

from accelkit.bench.results import blank_row
from accelkit.data.digits import digits

LAYERS, BATCH, IMAGES, GROUPS = 28, 50, 1000, 10
SAMPLERS = [("ddpm", 250), ("ddim", 50), ("ddim", 25)]
# (method, weights): kind, depth, cost relative to full depth's calls, what it adds to the FID
METHODS = {
    ("full", "original"): ("full", 28, 1.0, 0.0),
    ("D1", "original"): ("schedule", 24, 1.0, 2.1),
    ("D4", "original"): ("schedule", 20, 1.0, 9.5),
    ("D4", "tuned"): ("schedule", 20, 1.0, -0.02),
    ("tome:0.3", "original"): ("schedule", 28, 0.93, 1.2),
    ("first_block_cache:0.1", "original"): ("baseline", 28, 0.62, 0.55),
    ("pab", "original"): ("baseline", 28, 0.78, 0.12),
    ("D4+pab", "original"): ("combination", 20, 0.8, 10.4),
}
MACS = 457_793_536
PROTOCOL = {
    "command": "accelkit bench --model builtin --methods full,D1,D4,tome:0.3,pab,D4+pab,steps",
    "created": "2026-11-21T19:30:00Z",
    "accelkit": "0.1.0",
    "model": {
        "name": "builtin",
        "revision": None,
        "class": "DiTTransformer2DModel",
        "family": "dit",
        "blocks": LAYERS,
        "parameters": 3_456_789,
        "dtype": "float32",
    },
    "tuned_for": "D4",
    "training": {"steps": 400, "batch_size": 128, "learning_rate": 0.002, "ema_decay": 0.99},
    "data": {"name": "digits", "fingerprint": "83e5e3e2" * 8, "n": 1797},
    "images": IMAGES,
    "seed": 0,
    "classes": 10,
    "labels": "balanced",
    "batch_size": 250,
    "guidance": 1.0,
    "guidance_channels": None,
    "kernels": "auto",
    "samplers": [f"{name}:{steps}" for name, steps in SAMPLERS],
    "rounding": "round(255 x) to uint8",
    "extractor": {
        "name": "digit-cnn-v1",
        "version": "1",
        "sha256": "7bef49de" * 8,
        "dim": 64,
        "resize": "none",
    },
    "reference": {"name": "digits", "fingerprint": "83e5e3e2" * 8, "kind": "images", "n": 1797},
    "timing": {
        "rounds": 20,
        "batch_size": BATCH,
        "order": "interleaved, A B C A B C",
        "clock": "perf_counter",
        "warmup": "two steps of every row",
    },
    "machine": {
        "system": "Linux-6.1-x86_64-with-glibc2.36",
        "processor": "AMD EPYC",
        "cores": 2,
        "threads": 2,
        "gpu": None,
        "cuda": None,
        "python": "3.11.7",
        "packages": {"accelkit": "0.1.0", "torch": "2.13.0+cpu", "cache-dit": None},
    },
}


def measured():
    """Three settings, eight methods and fewer steps; one method skipped, energy never measured."""
    noise = np.random.default_rng(0)
    shared = noise.normal(0, 0.06, GROUPS)  # all rows have the same seeds
    rows = []
    for sampler, steps in SAMPLERS:
        rows += [_row(key, sampler, steps, shared, noise) for key in METHODS]
        rows.append(skipped("taylorseer", sampler, steps))
    for steps in (44, 40, 36, 33, 18):
        rows.append(_row((f"steps:{steps}", "original"), "ddim", steps, shared, noise))
    depths = [
        {
            "depth": depth,
            "seconds": _call(depth, 1.0),
            "seconds_quartiles": [0.97 * _call(depth, 1.0), 1.04 * _call(depth, 1.0)],
            "macs": _macs(depth),
            "batch_size": BATCH,
        }
        for depth in (1, 7, 12, 16, 20, 24, 28)
    ]
    return {
        "schema": 2,
        "protocol": copy.deepcopy(PROTOCOL),
        "rows": rows,
        "depths": depths,
        "throughput": [
            {
                **dict(zip(("method", "weights"), key, strict=True)),
                "sampler": "ddim",
                "steps": 50,
                "batch_size": size,
                "images_per_second": size / (0.05 + size * _call(METHODS[key][1], 1.0)),
            }
            for key in (("full", "original"), ("D4", "tuned"))
            for size in (1, 16, 256)
        ],
        "samples": [],
        "published": [],
    }


def published():
    """Published figures of a reproduction."""
    source = {"source": "Moon et al. 2024, table 3", "setting": "DiT-XL/2, ImageNet 256"}
    figures = [("full", 250, 9.078, 0.05, None), ("D4", 250, 8.679, 0.07, 0.3046)]
    figures += [("full", 50, 9.12, None, None), ("D6", 50, 8.9, 0.1, 0.37)]
    return [
        {
            **source,
            "method": method,
            "sampler": "ddpm" if steps == 250 else "ddim",
            "steps": steps,
            "fid": fid,
            "fid_std": std,
            "saving": saving,
        }
        for method, steps, fid, std, saving in figures
    ]


def one_row(**fields):
    """Results with a single row that has only the given fields."""
    row = {**blank_row(), "method": "full", "kind": "full", "weights": "original"}
    row |= {"sampler": "ddim", "steps": 50, **fields}
    bare = {"data": None, "reference": None, "extractor": None, "training": None, "tuned_for": None}
    protocol = {**copy.deepcopy(PROTOCOL), **bare, "samplers": ["ddim:50"]}
    nothing = {"depths": [], "throughput": [], "samples": [], "published": []}
    return {"schema": 2, "protocol": protocol, "rows": [row], **nothing}


def skipped(method, sampler, steps):
    """A row that did not run."""
    return {
        **blank_row(),
        "method": method,
        "kind": "baseline",
        "weights": "original",
        "sampler": sampler,
        "steps": steps,
        "skipped": "cache-dit is not installed; pip install 'accelkit[bench]'",
    }


def with_samples(results, directory):
    """Write pictures of ten digits, noisier for rows of higher FID, and add them to the results."""
    images, labels = digits()
    chosen = [int(np.flatnonzero(labels == label)[3]) for label in range(10)]
    strip = np.concatenate([images[i] for i in chosen], axis=1).astype(float)
    noise = np.random.default_rng(1).normal(0, 1, strip.shape)
    (directory / "samples").mkdir(parents=True, exist_ok=True)
    samples = []
    rows = [row for row in results["rows"] if row["steps"] == 50 and row["skipped"] is None]
    for index, row in enumerate(rows):
        picture = (strip + noise * 6 * max(row["fid"] - 2, 0)).clip(0, 255).astype(np.uint8)
        file = f"samples/{index}.png"
        Image.fromarray(picture).save(directory / file)
        samples.append({k: row[k] for k in ("method", "weights", "sampler", "steps")})
        samples[-1]["file"] = file
    return {**results, "samples": samples}


def _row(key, sampler, steps, shared, noise):
    fewer = key[0].startswith("steps:")
    kind, depth, cost, worse = ("baseline", 28, 1.0, 0.0) if fewer else METHODS[key]
    seconds = steps * BATCH * _call(depth, cost)
    asked = min(s for name, s in SAMPLERS if name == sampler and s >= steps) if fewer else steps
    full = asked * BATCH * _call(LAYERS, 1.0)
    width = 0.0 if key[0] == "full" else 0.015
    fid = 2.3 + 900 / steps**2 * (sampler == "ddim") + worse * (1 + 5 / steps)
    jackknife = fid + shared + noise.normal(0, 0.015, GROUPS)
    return {
        **blank_row(),
        **dict(zip(("method", "weights"), key, strict=True)),
        "kind": kind,
        "schedule": f"{depth}@1" if kind != "baseline" or fewer else None,
        "sampler": sampler,
        "steps": steps,
        "fid": fid,
        "fid_stderr": float(np.std(jackknife) * np.sqrt(GROUPS - 1)),
        "fid_jackknife": jackknife.tolist(),
        "inception_score": 8.9 - 0.1 * fid,
        "inception_score_std": 0.11,
        "kid": 0.001 * fid,
        "kid_std": 0.0004,
        "precision": 0.9 - 0.02 * fid,
        "recall": 0.8 - 0.02 * fid,
        "density": 1.1 - 0.05 * fid,
        "coverage": 0.95 - 0.02 * fid,
        "images": IMAGES,
        "manifold_images": IMAGES,
        "missing": {
            "sfid": "the digit features are not spatial",
            "energy_joules": "the machine has no counter",
        },
        "seconds": seconds,
        "seconds_quartiles": [0.97 * seconds, 1.05 * seconds],
        "saving": 1 - seconds / full,
        "saving_interval": [1 - width - seconds / full, 1 + width - seconds / full],
        "denoiser_seconds": 0.9 * seconds,
        "first_call_seconds": 1.4 * seconds,
        "peak_memory_bytes": 900_000_000 + 1_000_000 * depth,
        "ideal_saving": 1 - steps * _macs(depth) / (asked * _macs(LAYERS)),
        "macs_per_image": steps * _macs(depth),
        "mean_depth": float(depth),
        "layers": LAYERS,
    }


def _call(depth, cost):
    """Seconds of a network call per image."""
    return cost * (4e-5 + 3.4e-5 * depth)


def _macs(depth):
    return MACS * (depth + 1) // (LAYERS + 1)
