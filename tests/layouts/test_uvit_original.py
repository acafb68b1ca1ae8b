"""The released U-ViT layout, both ways, and every way a file can be wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accelkit.errors import AccelkitError
from accelkit.layouts import uvit as uvit_original
from accelkit.layouts.original import load_original, read_state_dict, save_original, to_original
from accelkit.models import PUBLISHED, UViTTransformer2DModel


def released(width=32, depth=4, patch=2, channels=3, side=4, classes=None, conv=True):
    """Random weights under the released names, written out as the original's modules have them."""
    random = torch.Generator("cpu").manual_seed(0)
    meta = torch.get_default_device().type == "meta"

    def draw(*shape):
        return torch.empty(shape) if meta else torch.randn(shape, generator=random) * 0.1

    def linear(name, rows, columns):
        return {f"{name}.weight": draw(rows, columns), f"{name}.bias": draw(rows)}

    def block(name):
        state = {}
        for norm in ("norm1", "norm2"):
            state |= {f"{name}.{norm}.weight": draw(width), f"{name}.{norm}.bias": draw(width)}
        state |= {f"{name}.attn.qkv.weight": draw(3 * width, width)}
        state |= linear(f"{name}.attn.proj", width, width)
        state |= linear(f"{name}.mlp.fc1", 4 * width, width)
        return state | linear(f"{name}.mlp.fc2", width, 4 * width)

    tokens = side**2 + (1 if classes is None else 2)
    state = {
        "pos_embed": draw(1, tokens, width),
        "patch_embed.proj.weight": draw(width, channels, patch, patch),
        "patch_embed.proj.bias": draw(width),
    }
    if classes is not None:
        state["label_emb.weight"] = draw(classes, width)
    for i in range(depth // 2):
        state |= block(f"in_blocks.{i}")
        state |= block(f"out_blocks.{i}") | linear(f"out_blocks.{i}.skip_linear", width, 2 * width)
    state |= block("mid_block")
    state |= {"norm.weight": draw(width), "norm.bias": draw(width)}
    state |= linear("decoder_pred", patch**2 * channels, width)
    if conv:
        state |= {
            "final_layer.weight": draw(channels, channels, 3, 3),
            "final_layer.bias": draw(channels),
        }
    return state


@pytest.fixture
def write(tmp_path):
    """Writes a checkpoint, with some weights changed or (None) left out."""

    def to_file(state=None, suffix=".pth", **changes):
        state = {**(released() if state is None else state), **changes}
        path = tmp_path / f"nnet_ema{suffix}"
        kept = {name: value for name, value in state.items() if value is not None}
        save_file(kept, path) if suffix == ".safetensors" else torch.save(kept, path)
        return path

    return to_file


# --- loading and saving ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uncond", "class"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_recorded_weights_both_ways(golden, tmp_path, write, name, suffix):
    file = golden / f"uvit_public_{name}.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        wanted = json.loads(opened.metadata()["config"])
    weights = {k[7:]: v for k, v in tensors.items() if k.startswith("weight.")}
    model = load_original(write(weights, suffix), num_heads=wanted["num_heads"])
    assert not model.training
    config = model.config
    assert (config.sample_size, config.patch_size) == (wanted["img_size"], wanted["patch_size"])
    assert (config.num_layers, config.in_channels) == (wanted["depth"], wanted["in_chans"])
    assert (config.num_classes or -1, config.mlp_ratio) == (wanted["num_classes"], 4)
    assert (config.conv, config.qkv_bias) == (wanted.get("conv", True), False)
    with torch.no_grad():
        x, t, y = (tensors.get(f"input.{key}") for key in "xty")
        output = model(x, t, y).sample
    torch.testing.assert_close(output, tensors["output.full"], atol=2e-5, rtol=0)

    save_original(model, tmp_path / f"back{suffix}")
    back = read_state_dict(tmp_path / f"back{suffix}")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


@pytest.mark.parametrize("classes", [None, 6])
@pytest.mark.parametrize("conv", [True, False])
def test_what_the_weights_show(write, classes, conv):
    state = released(classes=classes, conv=conv, depth=6, patch=4, channels=5, side=3)
    extra = {
        f"{name}.attn.qkv.bias": torch.zeros(96)
        for name in (
            "mid_block",
            *(f"{side}_blocks.{i}" for side in ("in", "out") for i in range(3)),
        )
    }
    extra |= {"time_embed.0.weight": torch.zeros(128, 32), "time_embed.0.bias": torch.zeros(128)}
    extra |= {"time_embed.2.weight": torch.zeros(32, 128), "time_embed.2.bias": torch.zeros(32)}
    for more in ({}, extra):
        config = load_original(write(state | more), num_heads=4).config
        assert (
            dict(config).items()
            >= {
                "sample_size": 12,
                "patch_size": 4,
                "in_channels": 5,
                "num_layers": 6,
                "num_attention_heads": 4,
                "attention_head_dim": 8,
                "mlp_ratio": 4.0,
                "num_classes": classes,
                "null_class": None if classes is None else 5,
                "conv": conv,
                "qkv_bias": bool(more),
                "mlp_time_embed": bool(more),
            }.items()
        )


def test_published_sizes_give_the_published_configuration(monkeypatch):
    monkeypatch.setattr(uvit_original, "materialize", lambda model, state: None)
    monkeypatch.setattr(UViTTransformer2DModel, "load_state_dict", lambda model, state: None)
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            state = UViTTransformer2DModel(**config).state_dict()
        found = dict(uvit_original.read("x.pth", state, None, {}, {}).config)
        assert found.items() >= config.items(), name


def test_what_the_file_leaves_open_can_be_said(write):
    path = write(released(classes=6))
    assert load_original(path, num_heads=4).config.timestep_offset == 0.999  # nearest: S, CIFAR-10
    given = {"null_class": None, "timestep_scale": 1.0, "timestep_offset": 1.0}
    config = load_original(path, family="uvit", num_heads=4, **given).config
    assert {name: config[name] for name in given} == given


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_one_dtype_is_kept(write, dtype):
    state = {key: value.to(dtype) for key, value in released().items()}
    model = load_original(write(state), num_heads=4)
    assert {p.dtype for p in model.parameters()} == {dtype}
    back = to_original(model)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    mixed = load_original(write(state, **{"norm.bias": torch.ones(32)}), num_heads=4)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


def test_weights_are_independent_of_the_file(write):
    path = write()
    before = torch.get_rng_state()
    model = load_original(path, num_heads=4)
    assert torch.equal(torch.get_rng_state(), before)
    path.write_bytes(b"gone")
    assert torch.equal(model.pos_embed, released()["pos_embed"])
    assert not any(p.is_meta for p in model.parameters())


# --- what is refused, each in one line -------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mid_block.norm1.bias": None, "extra": torch.ones(1)},
            r"not a whole U-ViT \(nearest: cifar10-s2\); missing: mid_block\.norm1\.bias; "
            "unexpected: extra",
        ),
        (
            {"out_blocks.4.skip_linear.weight": torch.ones(32, 64)},
            r"missing: (\S+, ){3}\S+ and \d+ more; unexpected: none",
        ),
        ({f"x{i}": torch.ones(1) for i in range(13)}, r"unexpected: (x\d+, ){3}x\d+ and 9 more"),
        ({"patch_embed.proj.weight": None}, "missing: patch_embed.proj.weight"),
        ({"pos_embed": None}, "missing: pos_embed"),
        ({"label_emb.weight": torch.ones(7, 32)}, "17 tokens, which is no square .* and label"),
        ({"pos_embed": torch.ones(1, 20, 32)}, "20 tokens, which is no square of patches"),
        ({"pos_embed": torch.ones(17, 32)}, r"pos_embed has shape \[17, 32\]; expected \(1, tok"),
        ({"patch_embed.proj.weight": torch.ones(32, 12)}, r"expected \(D, C, p, p\)"),
        (
            {"out_blocks.1.skip_linear.weight": torch.ones(32, 32)},
            r"wrong shapes: out_blocks\.1\.skip_linear\.weight \[32, 32\] \(expected \[32, 64\]\)",
        ),
        ({"norm.bias": torch.ones(32, dtype=torch.int64)}, "norm.bias is torch.int64"),
        (
            {"context_embed.weight": torch.ones(32, 768)},
            "text to image, which accelkit has no model for",
        ),
    ],
)
def test_files_that_do_not_fit(write, changes, message):
    with pytest.raises(AccelkitError, match=message) as error:
        load_original(write(**changes), num_heads=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [
        ({"depth": 14, "width": 40, "side": 16}, "cifar10-s2"),
        ({"patch": 4, "side": 16, "width": 500, "depth": 12}, "celeba64-s4"),
        ({"channels": 4, "side": 16, "width": 1100, "depth": 28}, "imagenet256-h2"),
        ({"channels": 4, "side": 16, "width": 1000, "depth": 20, "patch": 4}, "imagenet512-l4"),
    ],
)
def test_the_nearest_configuration_is_named(sizes, nearest):
    with torch.device("meta"):
        state = released(**sizes)
    del state["norm.bias"]
    with pytest.raises(AccelkitError, match=rf"nearest: {nearest}\); missing: norm\.bias"):
        uvit_original.read("x.pth", state, 4, {}, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "width 32, which no published U-ViT has; give num_heads"),
        ({"num_heads": 5}, "num_heads=5 does not divide the width 32"),
        ({"num_heads": 4, "depth": 3}, "depth=3 is unknown; known: .*num_layers"),
        ({"num_heads": 4, "num_layers": 6}, "num_layers=6 contradicts .*: it has 4"),
        ({"num_heads": 4, "sample_size": 64}, "sample_size=64 contradicts .*: it has 8"),
        ({"num_heads": 4, "null_class": 3}, "null_class=3 with num_classes=None"),
        ({"num_heads": 4, "family": "dit"}, "no original DiT"),
    ],
)
def test_wrong_settings(write, settings, message):
    with pytest.raises(AccelkitError, match=message):
        load_original(write(), **settings)


def test_head_count_of_a_wrong_type(write):
    with pytest.raises(TypeError, match="num_heads must be an integer"):
        load_original(write(), num_heads="4")


def test_another_layout_is_no_uvit(write):
    with pytest.raises(AccelkitError, match=r"no U-ViT: it has no out_blocks"):
        load_original(write({"a": torch.ones(1)}), family="uvit")
