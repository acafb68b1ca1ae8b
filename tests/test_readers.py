"""For any content of a file or text, each reader returns a value or refuses it in one line."""

import contextlib
import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from fuzz import value_or_refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import accelkit
from accelkit.artifact.names import named
from accelkit.bench.results import read_results
from accelkit.cli.settings import read_recipe
from accelkit.compute import Compute, Merge
from accelkit.data import shards
from accelkit.data.class_map import read_class_map
from accelkit.data.sources import open_source
from accelkit.errors import AccelkitWarning
from accelkit.jobs.sample import parse_labels
from accelkit.metrics import npz
from accelkit.schedule import Schedule, check_readable

few = settings(
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
BYTES = st.binary(max_size=300)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from([10**400, -1, 0, 2**63, 1e308, "\ud800", "a\0b", "x" * 5_000, "[/b]"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Yield the path of every place in JSON data."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@st.composite
def spoiled(draw, whole):
    """Draw JSON of ``whole`` with up to three places changed or removed, or arbitrary bytes."""
    if draw(st.integers(0, 4)) == 0:
        return draw(BYTES)
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([p for p in places(value) if p] or [("x",)]))
        holder = value
        for key in way:
            holder = holder[key]
        if draw(st.booleans()) or not isinstance(holder, dict):
            holder[last] = draw(VALUES)
        else:
            holder.pop(last, None)
    return json.dumps(value).encode()


# --- texts

WORDS = "D4 full uniform: tome: dvd-3p: threshold= depth= @ , ; + : - / B4 F3 all 28 0.5 1 nan inf"
PIECES = st.sampled_from(
    [*WORDS.split(), "1e400", "9" * 5_000, "x" * 5_000, "   ", "\n", "\0", "²", "٣", "\ud800"]
)
ENDINGS = st.sampled_from(["", "", ".toml", ".json"])
TEXTS = st.tuples(st.lists(PIECES, max_size=9).map("".join), ENDINGS).map("".join)
TEXTS |= st.text(st.characters(), max_size=60)


@settings(few, max_examples=200)
@given(TEXTS, st.sampled_from(["dit", "uvit", "unet"]), st.integers(1, 40))
def test_schedules(text, family, depth):
    value_or_refusal(Schedule.parse, text, depth, family)
    value_or_refusal(check_readable, text)


@settings(few, max_examples=100)
@given(TEXTS)
def test_merging(text):
    found = value_or_refusal(Merge.parse, text)
    assert found is None or 0 < found.ratio <= 0.75


@few
@given(TEXTS)
def test_labels(text):
    found = value_or_refusal(parse_labels, text)
    assert found is None or min(found) >= 0


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5_000 + "@1",
        "1+tome:" + " " * 100_000 + "x@1",  # a pattern that backtracks takes minutes
        "28@" + " " * 100_000 + "x",
        "uniform:" + "9" * 5_000,
        "1+tome:0.3:B" + "9" * 5_000 + "@1",
        "dvd-2p:depth=" + "9" * 5_000,
        "x" * 1_000_000,
        "x" * 300 + ".toml",
    ],
    ids=lambda text: text[:14],
)
def test_long_schedules(text):
    assert value_or_refusal(Schedule.parse, text) is None


# --- files

SCHEDULE = {
    "name": "a",
    "layers": 6,
    "family": "",
    "intervals": [
        {"until": 0.5, "depth": 6, "merge": {"ratio": 0.3, "placement": "B", "blocks": 2}},
        {"until": 1, "depth": 3},
    ],
}
ARTIFACT = {
    "format": 1,
    "family": "dit",
    "schedule": SCHEDULE,
    "base_model_name_or_path": "builtin",
    "revision": None,
    "vae": None,
    "num_heads": None,
    "lora": {"rank": 2, "probes": [{"layer": "x", "row": 0, "column": 1, "weight": 0.5}]},
}


@few
@given(content=spoiled(SCHEDULE))
def test_schedule_files(content, tmp_path):
    path = tmp_path / "s.json"
    path.write_bytes(content)
    found = value_or_refusal(Schedule.parse, path)
    assert found is None or found.layers == 28


@few
@given(content=BYTES | TEXTS.map(lambda text: f"layers = {text}".encode(errors="replace")))
def test_schedule_files_in_toml(content, tmp_path):
    path = tmp_path / "s.toml"
    path.write_bytes(content)
    value_or_refusal(Schedule.load, path)


def test_a_model_of_no_blocks_has_no_schedule(tmp_path):
    content = {"layers": 0, "intervals": [{"until": 1, "depth": 0}]}
    assert value_or_refusal(Schedule.from_dict, content) is None


@few
@given(data=VALUES)
def test_computes(data):
    if isinstance(data, dict):
        with contextlib.suppress(TypeError, ValueError):  # as documented; AccelkitError is one
            Compute.from_dict(data)


@few
@given(content=spoiled(ARTIFACT))
def test_artifacts(content, tmp_path):
    (tmp_path / "accelkit.json").write_bytes(content)
    found = value_or_refusal(lambda path: named(path).config, tmp_path)
    if found is not None:
        assert Schedule.from_dict(found["schedule"]).layers > 0
        assert isinstance(found["base_model_name_or_path"], str)


WORDS_OF_TOML = "steps model [model] [a.b] = = 3 'x' true nan [1] {a=1} 1979-05-27 steps=2 [[x]]"
TOML = st.sampled_from([*WORDS_OF_TOML.split(), '"\\u0000"', "\n", "\n", "0x" + "f" * 999])


@settings(few, max_examples=80)
@given(content=BYTES | st.lists(TOML, max_size=10).map(lambda parts: "".join(parts).encode()))
def test_recipes(content, tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    found = value_or_refusal(read_recipe, path, ("model",))
    assert found is None or isinstance(found, dict)


def test_a_recipe_that_sets_an_option_twice(tmp_path):
    (tmp_path / "r.toml").write_text("[a]\nsteps = 1\n[b]\nsteps = 2\n")
    with pytest.raises(accelkit.AccelkitError, match="sets steps twice"):
        read_recipe(tmp_path / "r.toml")


ROW = {"schema": 2, "protocol": {}, "rows": [], "depths": [], "samples": [], "published": []}


@few
@given(content=spoiled(ROW))
def test_results(content, tmp_path):
    (tmp_path / "results.json").write_bytes(content)
    value_or_refusal(read_results, tmp_path)


INDEX = {"count": 2, "files": ["shard-00000.safetensors"], "classes": ["a"], "skipped": 0}


@few
@given(content=spoiled(INDEX), shard=st.none() | BYTES)
def test_indexes_of_caches(content, shard, tmp_path, recwarn):
    (tmp_path / "index.json").write_bytes(content)
    whole = save({"mean": torch.zeros(2, 1), "index": torch.arange(2)})
    (tmp_path / "shard-00000.safetensors").write_bytes(whole if shard is None else shard)

    found = shards.cached(tmp_path, shards.Shards, "latents")
    assert found is not None or any(w.category is AccelkitWarning for w in recwarn)


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def array(values):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def claiming(shape, descr="<f8"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


REFERENCE = zipped(
    mu=array(np.zeros(3)), sigma=array(np.eye(3)), arr_0=array(np.zeros((2, 4, 4, 3), np.uint8))
)


@settings(few, max_examples=80)
@given(data=st.data())
def test_references(data, tmp_path):
    content = bytearray(REFERENCE)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "r.npz"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    value_or_refusal(npz.read_statistics, path, npz.POOLED, 3)
    if value_or_refusal(npz.image_shape, path) is not None:
        value_or_refusal(lambda: list(npz.iter_images(path, 2)))


@pytest.mark.parametrize(
    "content",
    [
        zipped(mu=claiming((10**6,)), sigma=claiming((10**6, 10**6))),  # 7 TiB
        zipped(mu=claiming((3,)), sigma=claiming((3, 3))),
        zipped(mu=claiming((3,), "|O"), sigma=claiming((3, 3))),
        zipped(mu=claiming((-3,)), sigma=claiming((3, 3))),
        zipped(mu=claiming((10**400,)), sigma=claiming((3, 3))),
        zipped(mu=b"\x93NUMPY\x01\x00" + (9_000).to_bytes(2, "little") + b"(" * 9_000, sigma=b""),
        zipped(mu=array(np.zeros(3, complex)), sigma=array(np.eye(3))),
        zipped(arr_0=claiming((10**9, 4, 4, 3), "|u1")),
    ],
)
def test_what_a_reference_claims_is_compared_with_its_size(content, tmp_path):
    path = tmp_path / "r.npz"
    path.write_bytes(content)
    assert value_or_refusal(npz.read_statistics, path, npz.POOLED, 3) is None
    assert value_or_refusal(npz.image_shape, path) is None


@few
@given(content=BYTES | spoiled({"ant": 0, "bee": 1}))
def test_class_maps(content, tmp_path):
    for name in ("c.json", "c.txt"):
        (tmp_path / name).write_bytes(content)
        value_or_refusal(read_class_map, tmp_path / name)


LINES = spoiled({"file_name": "a.png", "text": "a caption"})


@pytest.mark.filterwarnings("ignore::accelkit.errors.AccelkitWarning")  # of empty captions
@few
@given(lines=st.lists(LINES, min_size=1, max_size=3), ending=st.sampled_from(["jsonl", "txt"]))
def test_captions(lines, ending, tmp_path):
    folder = tmp_path / ending
    folder.mkdir(exist_ok=True)
    if not (folder / "a.png").exists():
        from PIL import Image

        Image.new("RGB", (8, 8)).save(folder / "a.png")
    name = "metadata.jsonl" if ending == "jsonl" else "a.txt"
    (folder / name).write_bytes(b"\n".join(lines))
    found = value_or_refusal(open_source, folder)
    if found is not None:
        value_or_refusal(lambda: found.captions)


# --- files that wait or never end


@pytest.mark.parametrize("name", ["accelkit.json", "accelkit.safetensors"])
def test_a_pipe_in_an_artifact(name, tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "base")
    accelkit.enable(pipe, "uniform:3")
    folder = accelkit.save(pipe, tmp_path / "tuned", base_model=str(tmp_path / "base"))
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert value_or_refusal(accelkit.from_pretrained, folder) is None
