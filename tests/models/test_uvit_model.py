"""U-ViT: against recorded outputs, the published sizes, and as a model of diffusers."""

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open

from accelkit.errors import AccelkitError
from accelkit.models import PUBLISHED, UViTTransformer2DModel
from accelkit.models.uvit import UViTBlock
from accelkit.runtime.switch import enable

TINY = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return UViTTransformer2DModel(**TINY | changes).eval()


def sample(batch=3, seed=1):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def recorded(folder, name):
    with safe_open(folder / f"uvit_public_{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def rebuilt(tensors, config):
    """The recorded network, its constructor's arguments renamed."""
    model = UViTTransformer2DModel(
        sample_size=config["img_size"],
        patch_size=config["patch_size"],
        in_channels=config["in_chans"],
        num_layers=config["depth"],
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["embed_dim"] // config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        mlp_time_embed=config["mlp_time_embed"],
        num_classes=None if config["num_classes"] < 0 else config["num_classes"],
        conv=config.get("conv", True),
    ).eval()
    model.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("weight.")})
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["uncond", "class"])
def test_full_output_is_the_originals(golden, name):
    tensors, config = recorded(golden, name)
    x, t, y = (tensors.get(f"input.{key}") for key in "xty")
    output = rebuilt(tensors, config)(x, t, y).sample
    torch.testing.assert_close(output, tensors["output.full"], atol=2e-5, rtol=0)


# parameters and keys of the original networks, counted
COUNTS = {
    "cifar10-s2": (44_255_328, 164),
    "celeba64-s4": (44_292_228, 164),
    "imagenet64-m4": (130_940_292, 213),
    "imagenet64-l4": (286_827_652, 261),
    "imagenet256-l2": (286_763_172, 261),
    "imagenet256-h2": (500_832_016, 355),
    "imagenet512-l4": (286_861_524, 261),
    "imagenet512-h4": (500_942_656, 355),
}


def test_published_configurations_have_the_originals_parameters():
    assert set(PUBLISHED) == set(COUNTS)
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            model = UViTTransformer2DModel(**config)
        found = sum(p.numel() for p in model.parameters()), len(model.state_dict())
        assert found == COUNTS[name], name


def test_published_networks_are_told_the_time_as_they_were_trained():
    index = torch.arange(1000)
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            model = UViTTransformer2DModel(**config)
        discrete = name in ("imagenet256-h2", "imagenet512-h4")
        # steps counted from 1, or 999 t at t = (index + 1) / 1000
        expected = index + 1.0 if discrete else 999 * (index + 1) / 1000
        told = model.timestep_of(index)
        torch.testing.assert_close(told, expected)
        back = [model.index_of(t) for t in told.tolist()]
        assert back == pytest.approx(index.tolist(), abs=1e-3)
        assert config["null_class"] == (1000 if config["num_classes"] == 1001 else None)


def test_a_new_network_is_initialised_as_published():
    model = tiny(num_attention_heads=8, num_classes=5, null_class=4)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any()
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
            assert module.eps == 1e-5
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.label_emb.weight.std().item() == pytest.approx(1, rel=0.2)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    model.initialize()
    again = copy.deepcopy(model.state_dict())
    assert not torch.equal(before["pos_embed"], again["pos_embed"])
    torch.manual_seed(0)
    model.initialize()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


@torch.no_grad()
def test_one_timestep_or_label_for_all():
    model, x = tiny(num_classes=5), sample()
    y = torch.tensor([3, 3, 3])
    expected = model(x, torch.tensor([7.0, 7.0, 7.0]), y).sample
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([7] * 3)):
        assert torch.equal(model(x, t, y).sample, expected)
    assert torch.equal(model(x, 7, y[:1]).sample, expected)
    assert not torch.equal(model(x, 7.5, y).sample, expected)  # fractions count
    held = model(x, 7, y, return_dict=False)
    assert type(held) is tuple
    assert torch.equal(held[0], expected)


@torch.no_grad()
def test_options_of_the_original():
    x = sample()
    plain = tiny()
    for changes, added in (
        ({"qkv_bias": True}, 5 * 48),
        ({"mlp_time_embed": True}, 16 * 64 * 2 + 64 + 16),
        ({"conv": False}, -(4 * 4 * 9 + 4)),
        ({"num_classes": 6}, 6 * 16 + 16),
        ({"mlp_ratio": 2.0}, -5 * (2 * 16 * 32 + 32)),
    ):
        model = tiny(**changes)
        assert sum(p.numel() for p in model.parameters()) == added + sum(
            p.numel() for p in plain.parameters()
        )
        labels = torch.tensor([0, 1, 5]) if "num_classes" in changes else None
        assert model(x, 3, labels).sample.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype):
    model, x = tiny(), sample()
    expected = model(x, 500).sample
    output = copy.deepcopy(model).to(dtype)(x.to(dtype), 500).sample
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=0)


def test_gradient_checkpointing_changes_no_gradient():
    model, x = tiny(), sample()

    def gradients():
        model.zero_grad(set_to_none=True)
        model(x, 300).sample.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    calls = []
    for block in model.modules():
        if isinstance(block, UViTBlock):
            block.register_forward_pre_hook(lambda *_: calls.append(1))
    assert all(map(torch.equal, gradients(), plain))
    assert len(calls) == 10  # five blocks, each run again
    model.disable_gradient_checkpointing()
    assert all(map(torch.equal, gradients(), plain))
    assert len(calls) == 15


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = tiny(num_classes=5, null_class=4, conv=False, timestep_offset=1.0)
    model.save_pretrained(tmp_path)
    loaded = UViTTransformer2DModel.from_pretrained(tmp_path)
    assert (
        dict(loaded.config).items()
        >= {
            **TINY,
            "num_classes": 5,
            "null_class": 4,
            "conv": False,
            "qkv_bias": False,
            "mlp_time_embed": False,
            "timestep_scale": 1.0,
            "timestep_offset": 1.0,
        }.items()
    )
    x, y = sample(), torch.tensor([0, 4, 2])
    assert torch.equal(loaded(x, 7, y).sample, model(x, 7, y).sample)


def test_its_blocks_compile_one_by_one():
    model, x = tiny(), sample()
    with torch.no_grad():
        expected = model(x, 7).sample
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(model(x, 7).sample, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 13}, "num_layers=13; .*give an even number"),
        ({"num_layers": 0}, "num_layers=0; .*at least 2"),
        ({"sample_size": 9}, "sample_size=9 is not a multiple of the patch size 2"),
        ({"num_attention_heads": 1, "attention_head_dim": 7}, "width 7 is odd"),
        ({"num_attention_heads": 0}, "at least one pixel, channel, head .*; its config says 0"),
        ({"patch_size": 0}, "its config says 0"),
        ({"num_classes": 0}, "its config says 0"),
        ({"null_class": 4}, "null_class=4 with num_classes=None"),
        ({"null_class": 5, "num_classes": 5}, "null_class=5 with num_classes=5; .*the last row"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(AccelkitError, match=message) as error:
        tiny(**changes)
    assert "\n" not in str(error.value)


def test_calls_that_do_not_fit():
    x, y = sample(), torch.tensor([0, 1, 2])
    with pytest.raises(AccelkitError, match="has no classes; leave class_labels out"):
        tiny()(x, 7, y)
    with pytest.raises(AccelkitError, match="has 5 classes; give class_labels"):
        tiny(num_classes=5)(x, 7)
    for wrong in (x[:, :3], x[..., :6], x[0]):
        with pytest.raises(AccelkitError, match=r"takes samples \(B, 4, 8, 8\), got"):
            tiny()(wrong, 7)
    for wrong in (torch.tensor([1, 2]), torch.ones(3, 1)):
        with pytest.raises(AccelkitError, match="for a batch of 3; give one, or one per sample"):
            tiny()(x, wrong)


@pytest.mark.parametrize("schedule", ["full", "uniform:1", "2@0.5,1@1"])
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_an_empty_batch(schedule, kernels):
    model, none = tiny().eval(), torch.zeros(0)
    with torch.no_grad(), enable(model, schedule, kernels=kernels):
        assert model(sample()[:0], none).sample.shape == (0, 4, 8, 8)


def test_frequencies_fall_from_1_to_a_ten_thousandth():
    model, x = tiny(), torch.empty(1, 16, 16, dtype=torch.float64)
    features = model._sinusoids(torch.tensor([123.25]), x)[0].tolist()
    angles = [123.25 * 10000 ** (-i / 8) for i in range(8)]
    assert features == pytest.approx([*map(math.cos, angles), *map(math.sin, angles)], abs=1e-4)
