"""Hostile files, in every place where a user can name a file: each must be refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.reliability.trial import SILENT, Trial, Trials, run, shown
from benchmarks.reliability.world import SCHEDULE, copy_world

_RAN = "it-ran"
"""Folder that hostile code makes if it runs."""

Spoil = Callable[[Path], object]
_SAMPLE = ("sample", "-n", "1", "--steps", "2", "-o", "out")
_BENCH = ("bench", "--samplers", "auto:2", "--baselines", "", "--throughput", "", "-n", "2")
_BENCH = (*_BENCH, "--rounds", "1", "--timing-batch-size", "1", "-o", "out")
_TUNE = ("finetune", "--model", "model", "--schedule", SCHEDULE, "--steps", "1", "--batch-size")
_TUNE = (*_TUNE, "2", "--eval-images", "2", "--eval-batch-size", "2", "--sampling-steps", "2")
_TUNE = (*_TUNE, "-o", "out")


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (_RAN,))


# --- hostile contents

_RAW: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(4096),
    "deep lists": b"[" * 50_000,
    "deep objects": b'{"a":' * 50_000,
    "no UTF-8": b"\xff\xfe{\x00}\x00",
    "a list": b"[]",
    "null": b"null",
    "a long number": b"9" * 5_000,
    "a pickle": pickle.dumps(_Code()),
}


def _raw(name: str, content: bytes) -> Spoil:
    return lambda folder: _cleared(folder / name).write_bytes(content)


def _pipe(name: str) -> Spoil:
    return lambda folder: os.mkfifo(_cleared(folder / name))


def _endless(name: str) -> Spoil:
    return lambda folder: _cleared(folder / name).symlink_to("/dev/zero")


def _cleared(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def _edit(name: str, **change: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **change}))

    return spoil


def _safetensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def _npy(shape: tuple[int, ...], dtype: str = "<f8", body: bytes = b"") -> bytes:
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def _png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    return buffer.getvalue()


# --- files, and the commands that read them

Case = tuple[str, Spoil, tuple[str, ...]]


def _every_way(name: str, command: tuple[str, ...], *but: str) -> Iterator[Case]:
    for what, content in _RAW.items():
        if what not in but:
            yield f"{name}: {what}", _raw(name, content), command
    yield f"{name}: a pipe", _pipe(name), command
    yield f"{name}: /dev/zero", _endless(name), command


def _cases() -> Iterator[Case]:
    artifact = (*_SAMPLE, "--model", "artifact")
    model = (*_SAMPLE, "--model", "model")
    yield from _every_way("artifact/accelkit.json", artifact)
    yield from _every_way("artifact/accelkit.safetensors", artifact)
    for change in (
        {"schedule": 3},
        {"schedule": {"layers": 0, "intervals": [{"until": 1, "depth": 0}]}},
        {"schedule": {"layers": 4, "intervals": [{"until": 10**400, "depth": 4}]}},
        {"schedule": {"layers": 10**12, "intervals": [{"until": 1, "depth": 10**11}]}},
        {"base_model_name_or_path": "/dev/zero"},
        {"base_model_name_or_path": "artifact"},
        {"base_model_name_or_path": ["model"]},
        {"family": {"a": 1}},
        {"lora": {"rank": "x", "probes": 3}},
        {"lora": {"rank": 2, "probes": [{"layer": "x", "row": -1}]}},
        {"vae": 3},
        {"num_heads": "many"},
        {"num_heads": -1},
    ):
        yield f"artifact with {change}", _edit("artifact/accelkit.json", **change), artifact
    for content in (
        _safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        _safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
        _safetensors(b"[" * 50_000),
        struct.pack("<Q", 2**60),
        _safetensors({"a": {"dtype": "X9", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
    ):
        yield "safetensors", _raw("artifact/accelkit.safetensors", content), artifact
    yield from _every_way("model/model_index.json", model)
    yield from _every_way("model/transformer/config.json", model)
    for change in (
        {"num_layers": 10**9},
        {"num_layers": -1},
        {"num_layers": "x"},
        {"num_layers": 1},
        {"attention_head_dim": 10**9},
        {"sample_size": 10**9},
        {"num_attention_heads": 0},
        {"in_channels": -4},
        {"_class_name": "os.system"},
    ):
        yield f"network with {change}", _edit("model/transformer/config.json", **change), model
    for change in ({"block_out_channels": []}, {"layers_per_block": 10**9}, {"latent_channels": 0}):
        yield f"autoencoder with {change}", _edit("model/vae/config.json", **change), model
    for change in ({"num_train_timesteps": 10**12}, {"beta_start": "x"}, {"beta_end": -1e300}):
        spoil = _edit("model/scheduler/scheduler_config.json", **change)
        yield f"scheduler with {change}", spoil, model
    for content in (
        _saved(_Code()),
        _saved({"model": _Code()}),
        _saved([1, 2]),
        _saved({"x_embedder.proj.weight": torch.ones(1)}),
        _saved({1: 2}),
        b"PK\x03\x04 cut",
    ):
        yield "a checkpoint", _raw("dit.pt", content), (*_SAMPLE, "--model", "dit.pt")
    yield from _every_way("dit.pt", (*_SAMPLE, "--model", "dit.pt", "--num-heads", "2"))
    yield from _every_way("r.toml", ("sample", "--recipe", "r.toml", "--dry-run"), "nothing")
    for text in (
        "a = " + "{a = " * 50_000,
        "[" + "a." * 50_000 + "a]",
        "steps = 0x" + "f" * 99_999,
    ):
        yield "a recipe", _raw("r.toml", text.encode()), (*_SAMPLE, "--recipe", "r.toml")
    for suffix in ("json", "toml"):
        yield from _every_way(f"s.{suffix}", ("schedules", f"s.{suffix}"))
    yield from _every_way("bench/results.json", ("report", "bench"))
    reference = (*_BENCH, "--reference", "r.npz")
    for name, content in {
        "7 TiB": _npz(mu=_npy((10**6,)), sigma=_npy((10**6, 10**6))),
        "7 TiB of the right width": _npz(mu=_npy((64,)), sigma=_npy((64, 64))),
        "endless images": _npz(arr_0=_npy((10**9, 32, 32, 3), "|u1", bytes(999))),
        "wide images": _npz(arr_0=_npy((2, 10**6, 10**6, 3), "|u1", bytes(999))),
        "negative": _npz(arr_0=_npy((-1, 32, 32, 3), "|u1")),
        "objects": _npz(mu=_npy((64,), "|O", pickle.dumps(_Code())), sigma=_npy((64, 64))),
        "deep header": _npz(mu=b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000),
        "not finite": _npz(
            mu=_npy((64,), body=np.full(64, np.nan).tobytes()),
            sigma=_npy((64, 64), body=np.full(4096, np.inf).tobytes()),
        ),
        "nothing": b"",
        "no archive": b"PK\x03\x04" + bytes(999),
    }.items():
        yield f"a reference: {name}", _raw("r.npz", content), reference
    yield "a reference: a pipe", _pipe("r.npz"), reference
    tune = (*_TUNE, "--data", "data")
    for name, content in {
        "text": b"no picture",
        "a cut PNG": _png()[:-40],
        "a bomb, cut": _png((14_000, 14_000))[:5_000],
        "a GIF": b"GIF89a" + b"\xff" * 64,
    }.items():
        yield f"an image: {name}", _raw("data/ant/1.png", content), tune
    yield "an image: a pipe", _pipe("data/ant/1.png"), tune
    yield "an image: /dev/zero", _endless("data/ant/1.png"), tune
    yield "a folder in itself", lambda f: (f / "data/ant/self").symlink_to(".."), tune
    for name, members in _ARCHIVES.items():
        yield f"an archive: {name}", _archive(members), (*_TUNE, "--data", "d.zip")
    yield from _every_way("d.zip", (*_TUNE, "--data", "d.zip"))
    yield from _every_way("f.pt", (*_BENCH, "--features", "f.pt"))


Members = list[tuple[str, bytes | int]]
_ARCHIVES: dict[str, Members] = {
    "paths out of it": [("../../a.png", _png()), ("../../b.png", _png())],
    "a bomb": [("ant/0.png", 2**29), ("bee/0.png", _png())],
    "no image in a member": [("ant/0.png", b"x"), ("bee/0.png", b"y")],
    "a member cut short": [("ant/0.png", _png()[:-40]), ("bee/0.png", _png())],
}
"""Names and contents of members, or how many zeros they inflate to."""


def _archive(members: Members) -> Spoil:
    def spoil(folder: Path) -> None:
        with zipfile.ZipFile(folder / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members:
                with archive.open(name, "w") as file:
                    for _ in range(content // 2**20 if isinstance(content, int) else 0):
                        file.write(bytes(2**20))
                    file.write(content if isinstance(content, bytes) else b"")

    return spoil


def trials(world: Path, work: Path, count: int, draw: random.Random) -> Trials:
    """Yield ``count`` hostile files, or all if there are fewer."""
    cases = list(_cases())
    for name, spoil, command in draw.sample(cases, min(count, len(cases))):
        yield Trial(name, _judge(world, spoil, command))


def _judge(
    world: Path, spoil: Spoil, command: tuple[str, ...]
) -> Callable[[Path], tuple[str, str] | None]:
    def judge(folder: Path) -> tuple[str, str] | None:
        inner = folder / "here"
        copy_world(world, inner)
        spoil(inner)
        ran = run(command, inner)
        if any(folder.rglob(_RAN)):
            return SILENT, f"code ran; {shown(ran)}"
        if outside := [path.name for path in folder.iterdir() if path != inner]:
            return SILENT, f"wrote {outside} outside; {shown(ran)}"
        if ran.fault:
            return ran.fault, shown(ran)
        return None if ran.status or ran.warned else (SILENT, f"accepted; {shown(ran)}")

    return judge
