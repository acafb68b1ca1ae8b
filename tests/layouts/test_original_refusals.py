"""Every way a file can be no original checkpoint."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from original_layout import original_state, position_table
from safetensors.torch import save_file

from accelkit.errors import AccelkitError
from accelkit.layouts.checkpoint import write_state_dict
from accelkit.layouts.original import (
    load_original,
    read_state_dict,
)

# What is refused, each in one line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "width 32, which no published DiT has; give num_heads"),
        ({"num_heads": 5}, "num_heads=5 does not divide the width 32"),
        ({"num_heads": 0}, "num_heads=0; expected at least 1"),
        ({"num_heads": 4, "family": "unet"}, "family='unet' is unknown; known: dit"),
        ({"num_heads": 4, "depth": 3}, "depth=3 is unknown; known: .*num_layers"),
        ({"num_heads": 4, "num_layers": 3}, "num_layers=3 contradicts .*: it has 2"),
        ({"num_heads": 4, "sample_size": 32}, "sample_size=32 contradicts .*: it has 6"),
        ({"num_heads": 4, "attention_bias": False}, "attention_bias=False contradicts"),
    ],
)
def test_wrong_settings(small, settings, message):
    with pytest.raises(AccelkitError, match=message):
        load_original(small(), **settings)


@pytest.mark.parametrize("heads", [4.0, "4", True])
def test_head_count_of_a_wrong_type(small, heads):
    with pytest.raises(TypeError, match="num_heads must be an integer"):
        load_original(small(), num_heads=heads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.mlp.fc1.bias": None}, r"missing: blocks\.0\.mlp\.fc1\.bias; unexpected: none"),
        ({"extra": torch.ones(1)}, "missing: none; unexpected: extra"),
        ({"blocks.2.attn.proj.bias": torch.ones(32)}, "unexpected: blocks.2.attn.proj.bias"),
        (
            {"blocks.5.adaLN_modulation.1.weight": torch.ones(192, 32)},
            r"nearest: DiT-S/2\); missing: (\S+, ){3}\S+ and 35 more; unexpected: none",
        ),
        (
            {"blocks.1.attn.qkv.weight": torch.ones(32, 96)},
            r"qkv\.weight \[32, 96\] \(expected \[96",
        ),
        ({"final_layer.linear.weight": torch.ones(25, 32)}, "wrong shapes: .*expected .24, 32."),
        ({"x_embedder.proj.weight": torch.ones(32, 3, 2, 4)}, "wrong shapes: x_embedder"),
        ({"x_embedder.proj.weight": torch.ones(32, 12)}, r"expected \(D, C, p, p\)"),
        ({"x_embedder.proj.weight": torch.ones(30, 3, 2, 2)}, "multiple of 4"),
        ({"pos_embed": position_table(32, 3)[:, :8]}, "wrong shapes: pos_embed"),
        ({"pos_embed": position_table(32, 3) + 1e-3}, "pos_embed is not DiT's sine-cosine table"),
        ({"pos_embed": torch.full((1, 9, 32), torch.nan)}, "pos_embed is not DiT's"),
        (
            {"t_embedder.mlp.0.bias": torch.ones(32, dtype=torch.int64)},
            "torch.int64; expected float",
        ),
    ],
)
def test_wrong_weights(small, changes, message):
    with pytest.raises(AccelkitError, match=message) as error:
        load_original(small(**changes), num_heads=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "name"),
    [((28, 1152, 2), "DiT-XL/2"), ((23, 1024, 4), "DiT-L/4"), ((12, 768, 8), "DiT-B/8")],
)
def test_nearest_published_configuration(tmp_path, shape, name):
    depth, width, patch = shape
    state = {f"blocks.{i}.adaLN_modulation.1.weight": torch.ones(1, width) for i in range(depth)}
    state["x_embedder.proj.weight"] = torch.ones(1, 1, patch, patch)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(AccelkitError, match=rf"nearest: {name}\)"):
        load_original(tmp_path / "x.safetensors")


def test_other_layouts(tmp_path):
    save_file({"transformer_blocks.0.norm1.linear.bias": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(
        AccelkitError, match=r"no known family \(dit, uvit\); it holds transformer_blocks"
    ):
        load_original(tmp_path / "x.safetensors")
    with pytest.raises(AccelkitError, match="no original DiT"):
        load_original(tmp_path / "x.safetensors", family="dit")


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, kind):
    trace, path = tmp_path / "trace", tmp_path / "bad.pt"
    content = {"model": original_state(depth=1), "args": Payload(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"args": Payload(trace)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        AccelkitError, match=r"bad\.pt (is refused: .*could run code|cannot be read)"
    ):
        read_state_dict(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()  # so the payload was live


def test_refusal_names_what_was_found(tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "x.pt")
    with pytest.raises(AccelkitError, match=r"holds a torch\.nn\.modules\.linear\.Linear") as error:
        read_state_dict(tmp_path / "x.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list; expected a state dict"),
        ({}, "holds no tensors"),
        ({"ema": {}}, "holds no tensors"),
        ({"weight": [1.0]}, "'weight' is a list; expected tensors by name"),
        ({"steps": 3, "weights": {"a": torch.ones(1)}}, "'steps' is a int"),
        ({0: torch.ones(1)}, "not a state dict: 0 is"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(AccelkitError, match=message):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files(small, suffix):
    path = small(suffix)
    whole = path.read_bytes()
    noise = np.random.default_rng(0).bytes(1000)
    for content in (whole[: len(whole) // 2], whole[:-100], whole[:40], noise, b"<html></html>"):
        path.write_bytes(content)
        with pytest.raises(AccelkitError, match="cannot be read as a checkpoint: trunc") as error:
            read_state_dict(path)
        assert "\n" not in str(error.value)
    path.write_bytes(b"")
    with pytest.raises(AccelkitError, match="is empty"):
        read_state_dict(path)
    path.unlink()
    with pytest.raises(AccelkitError, match="does not exist"):
        read_state_dict(path)
    with pytest.raises(AccelkitError, match="is a folder; give one checkpoint file"):
        read_state_dict(path.parent)


@pytest.mark.parametrize("write", [torch.save, write_state_dict], ids=["torch", "accelkit"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damage_that_can_be_read_is_noticed(small, tmp_path, suffix, write):
    """Archives of torch carry checksums, which torch does not compare; safetensors has none."""
    if write is torch.save and suffix == ".safetensors":
        pytest.skip("files of other programs carry no checksum")
    whole = read_state_dict(small())
    path = tmp_path / f"x{suffix}"
    write(whole, path)
    content = path.read_bytes()
    damaged = []
    for at in range(3, len(content), len(content) // 60):
        damaged.append(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
    for at in range(0, len(content) - 512, len(content) // 9):
        damaged.append(content[:at] + bytes(512) + content[at + 512 :])
    refusals = []
    for changed in damaged:
        path.unlink()
        path.write_bytes(changed)
        try:
            read = read_state_dict(path)
        except AccelkitError as error:
            refusals.append(str(error))
        else:  # a byte that pads, or one of a name within the archive
            assert all(torch.equal(read[k], v) for k, v in whole.items())
    assert len(refusals) > 0.8 * len(damaged)
    assert all(re.search("is damaged|cannot be read as a checkpoint", line) for line in refusals)


def test_archives_without_checksums_are_read(small, tmp_path):
    whole = read_state_dict(small())
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(whole, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    read = read_state_dict(tmp_path / "x.pt")
    assert all(torch.equal(read[k], v) for k, v in whole.items())
