"""Original DiT checkpoints: against recorded outputs, there and back."""

import argparse
import copy
import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from original_layout import original_state, position_table
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accelkit.errors import AccelkitError
from accelkit.layouts.dit import PATCH_SIZES, PUBLISHED
from accelkit.layouts.original import (
    load_original,
    numerics,
    read_state_dict,
    restore_numerics,
    save_original,
    to_original,
)

GOLDEN = os.environ.get("ACCELKIT_GOLDEN")
needs_golden = pytest.mark.skipif(
    GOLDEN is None, reason="ACCELKIT_GOLDEN does not name the folder of recorded outputs"
)
TOLERANCE = 2e-5  # maximum absolute difference in float32 on CPU


@pytest.fixture(scope="module")
def golden():
    path = Path(GOLDEN) / "dit_public.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return load_file(path), config


@pytest.fixture
def golden_file(golden, tmp_path):
    tensors, _ = golden
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k[:7] == "weight."}
    path = tmp_path / "golden.safetensors"
    save_file(weights, path)
    return path


@torch.no_grad()
def difference(model, golden, output, prefix=""):
    tensors, _ = golden
    x, t, y = (tensors[f"input.{prefix}{name}"] for name in "xty")
    return (model(x, t, y).sample - tensors[f"output.{output}"]).abs().max().item()


# Parity with the original's recorded outputs


@needs_golden
def test_config_is_read_off_the_shapes(golden, golden_file):
    model = load_original(golden_file, num_heads=4)
    _, want = golden
    assert model.config.num_layers == want["depth"]
    assert model.config.sample_size == want["input_size"]
    assert model.config.patch_size == want["patch_size"]
    assert model.config.in_channels == want["in_channels"]
    assert model.config.out_channels == 2 * want["in_channels"]
    assert model.config.num_embeds_ada_norm == want["num_classes"]
    assert not model.training


@needs_golden
def test_full_output(golden, golden_file):
    assert difference(load_original(golden_file, num_heads=4), golden, "full") < TOLERANCE


@needs_golden
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_exit_output(golden, golden_file, blocks):
    model = load_original(golden_file, num_heads=4)
    model.transformer_blocks = model.transformer_blocks[:blocks]
    assert difference(model, golden, f"exit{blocks}") < TOLERANCE


@needs_golden
@torch.no_grad()
def test_guided_output(golden, golden_file):
    tensors, _ = golden
    x, t, y = (tensors[f"input.cfg_{name}"] for name in "xty")
    half = x[: len(x) // 2]
    model = load_original(golden_file, num_heads=4)
    out = model(torch.cat([half, half]), t, y).sample
    conditional, unconditional = out[:, :3].chunk(2)
    guided = unconditional + 3.0 * (conditional - unconditional)
    out = torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)
    assert (out - tensors["output.cfg3"]).abs().max() < TOLERANCE


@needs_golden
def test_saved_folder_keeps_the_numerics(golden, golden_file, tmp_path):
    load_original(golden_file, num_heads=4).save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["timestep_freq_shift"] == 0

    plain = DiTTransformer2DModel.from_pretrained(tmp_path / "folder")
    assert numerics(plain) == {"timestep_frequencies": "diffusers", "norm_eps": 1e-6}
    assert difference(plain, golden, "full") > 1e-3  # what goes wrong without them

    for _ in range(2):
        restore_numerics(plain)
        assert numerics(plain) == {"timestep_frequencies": "original", "norm_eps": 1e-6}
        assert difference(plain, golden, "full") < TOLERANCE


@needs_golden
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_round_trip_is_bit_equal(golden_file, tmp_path, suffix):
    want = load_file(golden_file)
    save_original(load_original(golden_file, num_heads=4), tmp_path / f"back{suffix}")
    got = read_state_dict(tmp_path / f"back{suffix}")
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["golden.safetensors", f"back{suffix}"]
    )


# The published sizes


# Parameters of the original models at 32x32 latents, frozen position table included.
COUNTS = {
    "S": (32_963_360, 32_945_024, 33_148_160),
    "B": (130_512_416, 130_475_648, 130_881_536),
    "L": (458_102_816, 458_053_760, 458_594_816),
    "XL": (675_129_632, 675_074_432, 675_683_072),
}


@pytest.mark.parametrize("size", COUNTS)
def test_published_parameter_counts(size):
    depth, width, heads = PUBLISHED[size]
    for patch, original in zip(PATCH_SIZES, COUNTS[size], strict=True):
        with torch.device("meta"):
            model = DiTTransformer2DModel(
                num_attention_heads=heads,
                attention_head_dim=width // heads,
                num_layers=depth,
                patch_size=patch,
                out_channels=8,
            )
        # diffusers' layout: no table, and the embedders once more for every block but one
        embedders = width**2 + 258 * width + 1001 * width
        want = original - (32 // patch) ** 2 * width + (depth - 1) * embedders
        assert sum(p.numel() for p in model.parameters()) == want
        if (size, patch) == ("XL", 2):
            assert want == 749_826_464


def test_head_count_of_a_published_width(tmp_path):
    save_file(original_state(width=384, depth=1), tmp_path / "s.safetensors")
    config = load_original(tmp_path / "s.safetensors").config
    assert (config.num_attention_heads, config.attention_head_dim) == (6, 64)


# Loading


def test_files_and_wrappings_give_the_same_model(tmp_path):
    state = original_state()
    older = {key: value + 1 for key, value in state.items()}
    run = {"model": older, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(seed=0)}
    save_file(state, tmp_path / "flat.safetensors")
    torch.save(state, tmp_path / "flat.pt")
    torch.save(run, tmp_path / "training.pt")
    torch.save({"model": state}, tmp_path / "no_ema.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        got = read_state_dict(path)
        assert got.keys() == state.keys(), path
        assert all(torch.equal(got[key], value) for key, value in state.items()), path


def built(state):
    """A module whose parameters have the names of a state dict."""
    root = torch.nn.Module()
    for name, value in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(value))
    return root


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_by_block(module):
    for name, block in list(module.blocks.named_children()):
        module.blocks.add_module(name, compiled(block))
    return module


WRAPPERS = {
    "parallel": torch.nn.DataParallel,
    "compiled": compiled,
    "parallel, compiled": lambda m: torch.nn.DataParallel(compiled(m)),
    "compiled, parallel": lambda m: compiled(torch.nn.DataParallel(m)),
    "twice": lambda m: compiled(torch.nn.DataParallel(torch.nn.DataParallel(compiled(m)))),
    "by block": compiled_by_block,
    "all of it": lambda m: compiled(torch.nn.DataParallel(compiled_by_block(m))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_lose_what_torchs_wrappers_add(wrap, suffix, tmp_path):
    state = original_state()
    wrapped = {k: v.detach().clone() for k, v in wrap(built(state)).state_dict().items()}
    assert wrapped.keys() != state.keys()
    path = tmp_path / f"dit{suffix}"
    if suffix == ".pt":
        torch.save({"ema": wrapped, "opt": {}}, path)
    else:
        save_file(wrapped, path)
    got = read_state_dict(path)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], value) for key, value in state.items())
    back = to_original(load_original(path, num_heads=4))
    assert all(torch.equal(back[key], value) for key, value in state.items() if key != "pos_embed")


def test_a_name_of_the_models_own_is_kept(tmp_path):
    """``module.`` is taken off only where all names begin with it."""
    state = {"module.a": torch.ones(1), "b.module.c": torch.ones(1)}
    save_file(state, tmp_path / "x.safetensors")
    assert read_state_dict(tmp_path / "x.safetensors").keys() == state.keys()


def test_two_weights_of_one_name_are_refused(tmp_path):
    torch.save({"a.b": torch.ones(1), "_orig_mod.a.b": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(AccelkitError, match=r"x\.pt holds a\.b more than once") as caught:
        read_state_dict(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_dtype_is_kept_through_a_round_trip(tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in original_state().items()}
    save_file(state, tmp_path / "x.safetensors")
    model = load_original(tmp_path / "x.safetensors", num_heads=4)
    assert {p.dtype for p in model.parameters()} == {dtype}
    if dtype != torch.float64:  # whose table here was rounded to float32 first
        back = to_original(model)
        assert all(torch.equal(back[key], value) for key, value in state.items())


def test_mixed_dtypes_become_float32(small):
    path = small(**{"x_embedder.proj.bias": torch.ones(32, dtype=torch.float16)})
    model = load_original(path, num_heads=4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.pos_embed.proj.bias.tolist() == [1.0] * 32


def test_weights_are_independent_of_the_file_and_of_each_other(small):
    path = small(".pt")
    model = load_original(path, num_heads=4)
    path.write_bytes(b"gone")
    pointers = [p.data_ptr() for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_loading_and_converting_draw_no_random_numbers(small):
    before = torch.get_rng_state()
    to_original(load_original(small(), num_heads=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_position_table_sample_size_is_needed(small):
    path = small(pos_embed=None)
    with pytest.raises(AccelkitError, match="no pos_embed; give sample_size"):
        load_original(path, num_heads=4)
    with pytest.raises(AccelkitError, match="sample_size=7 is not a multiple of the patch size 2"):
        load_original(path, num_heads=4, sample_size=7)
    with pytest.raises(TypeError, match="sample_size must be an integer"):
        load_original(path, num_heads=4, sample_size="6")
    model = load_original(path, num_heads=4, sample_size=6)
    assert torch.equal(to_original(model)["pos_embed"], position_table(32, 3))


def test_settings_the_file_leaves_open(small):
    model = load_original(small(), family="dit", num_heads=4, dropout=0.25, sample_size=6)
    assert model.config.dropout == 0.25
    assert (
        load_original(small(), num_heads=4, norm_eps=1e-5).transformer_blocks[0].norm3.eps == 1e-5
    )


# Numerics and the way back


def diffusers_dit(**changes):
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 4}
    torch.manual_seed(0)
    return DiTTransformer2DModel(**config | {"num_embeds_ada_norm": 5} | changes)


def share_embedders(model):
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def test_numerics_are_read_off_the_modules():
    model = diffusers_dit()
    restore_numerics(model)  # nothing recorded, nothing done
    assert numerics(model) == {"timestep_frequencies": "diffusers", "norm_eps": 1e-5}
    model.register_to_config(timestep_freq_shift=0)
    assert numerics(model)["timestep_frequencies"] == "diffusers"
    restore_numerics(model)
    assert numerics(model)["timestep_frequencies"] == "original"
    model.transformer_blocks[1].norm1.emb.time_proj.downscale_freq_shift = 1
    model.transformer_blocks[2].norm3.eps = 1e-6
    assert numerics(model) == {"timestep_frequencies": "mixed", "norm_eps": "mixed"}
    model.register_to_config(timestep_freq_shift=0.5)
    with pytest.raises(AccelkitError, match=r"timestep_freq_shift=0\.5 in the config"):
        restore_numerics(model)


def test_other_numerics_are_not_converted_silently(small, tmp_path):
    model = share_embedders(diffusers_dit())
    with pytest.raises(AccelkitError, match="allow_inexact=True"):
        to_original(model)
    save_original(model, tmp_path / "x.pt", allow_inexact=True)
    assert read_state_dict(tmp_path / "x.pt").keys() == original_state(depth=3).keys()
    with pytest.raises(AccelkitError, match="'norm_eps': 1e-05"):
        to_original(load_original(small(), num_heads=4, norm_eps=1e-5))


def test_rows_of_the_converted_attention():
    model = share_embedders(diffusers_dit())
    state = to_original(model, allow_inexact=True)
    attention = model.transformer_blocks[1].attn1
    for rows, linear in ((0, attention.to_q), (16, attention.to_k), (32, attention.to_v)):
        assert torch.equal(state["blocks.1.attn.qkv.weight"][rows : rows + 16], linear.weight)


def test_embedders_that_drifted_apart(small):
    model = load_original(small(), num_heads=4)
    drifted = copy.deepcopy(model)
    to_original(drifted)
    with torch.no_grad():
        drifted.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias[3] += 1e-6
    with pytest.raises(AccelkitError, match=r"t_embedder\.mlp\.2\.bias .* block 1's copy differs"):
        to_original(drifted)


def test_models_without_an_original_layout(tmp_path):
    with pytest.raises(AccelkitError, match="attention_bias=False"):
        to_original(diffusers_dit(attention_bias=False), allow_inexact=True)
    with pytest.raises(TypeError, match=r"expected a DiTTransformer2DModel or .*, got Linear"):
        to_original(torch.nn.Linear(1, 1))


def test_save_refuses_before_writing(small, tmp_path):
    model = load_original(small(), num_heads=4)
    with pytest.raises(AccelkitError, match=r"suffix '\.bin'; give \.safetensors, \.pt or \.pth"):
        save_original(model, tmp_path / "x.bin")
    with pytest.raises(AccelkitError, match="is not a folder; create it first"):
        save_original(model, tmp_path / "none" / "x.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_a_failed_save_leaves_the_old_file(small, tmp_path, monkeypatch):
    model = load_original(small(), num_heads=4)
    (tmp_path / "x.pt").write_bytes(b"old")

    def full_disk(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(AccelkitError, match="no room to write"):
        save_original(model, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.safetensors", "x.pt"]
