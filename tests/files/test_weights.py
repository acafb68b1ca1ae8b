"""Weights that are not finite numbers are refused, wherever a model is opened from."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import accelkit
from accelkit.errors import AccelkitError
from accelkit.files.weights import check_model, check_weights

FILE = "diffusion_pytorch_model.safetensors"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.fixture
def saved(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, change):
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def put(name, value):
    def change(tensors):
        tensors[name].view(-1)[5] = value

    return change


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_dtype(dtype, value):
    whole = torch.linspace(-9, 9, 600).reshape(20, 30)
    check_weights({"a": whole.to(dtype)}, "here")
    whole[13, 7] = value
    with pytest.raises(AccelkitError, match=r"^b in here holds NaN or infinite values") as caught:
        check_weights({"a": torch.zeros(3), "b": whole.to(dtype)}, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_finite_numbers_pass(dtype):
    info = torch.finfo(dtype)
    check_weights({"a": torch.tensor([info.max, info.min, info.tiny], dtype=dtype)}, "here")


def test_tensors_without_values_pass():
    check_weights({"empty": torch.zeros(0, 3), "meta": torch.zeros(9, device="meta")}, "here")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_integers_are_refused(dtype):
    with pytest.raises(AccelkitError, match=r"a in here is stored as (int32|uint8|bool),"):
        check_weights({"a": torch.ones(3, dtype=dtype)}, "here")


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "transformer_blocks.2.ff.net.0.proj.weight"),
        ("vae", "decoder.conv_out.weight"),
    ],
)
def test_a_component_of_a_pipeline(saved, part, name):
    edit(saved / part / FILE, put(name, math.nan))
    with pytest.raises(AccelkitError, match=rf"^{name} in the {part} of {saved} holds NaN"):
        accelkit.from_pretrained(saved)


def test_a_pipeline_of_integers(saved):
    """diffusers casts them, which changes the weights."""
    name = "transformer_blocks.2.attn1.to_q.weight"

    def change(tensors):
        tensors[name] = (100 * tensors[name]).int()

    edit(saved / "transformer" / FILE, change)
    assert DiTPipeline.from_pretrained(saved).transformer.dtype == torch.float32
    with pytest.raises(AccelkitError, match=rf"^{name} in the transformer of .* stored as I32,"):
        accelkit.from_pretrained(saved)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_original_file(original, suffix, tmp_path):
    state = {name: value.clone() for name, value in load_file(original).items()}
    state["blocks.1.attn.qkv.weight"][3, 4] = math.inf
    path = tmp_path / f"poisoned{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    with pytest.raises(AccelkitError, match=r"attn1\.to_q\.weight in .*poisoned.* holds NaN"):
        accelkit.load_original(path, num_heads=2)


def test_a_directory_of_a_network_alone(original, pipe, tmp_path):
    pipe.vae.save_pretrained(tmp_path / "vae")
    accelkit.load_original(original, num_heads=2).save_pretrained(tmp_path / "alone")
    edit(tmp_path / "alone" / FILE, put("proj_out_2.weight", math.nan))
    with pytest.raises(AccelkitError, match=r"^proj_out_2\.weight in the transformer of .*alone"):
        accelkit.from_pretrained(tmp_path / "alone", vae=str(tmp_path / "vae"))


def test_quantised_networks_pass():
    """Their libraries store integers and packed values."""
    for mark in ("quantization_config", "is_quantized", "hf_quantizer"):
        model = nn.Linear(3, 3)
        model.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
        with pytest.raises(AccelkitError, match="weight in here is stored as int8"):
            check_model(model, "here")
        holder = model
        if mark == "quantization_config":
            holder = model.config = SimpleNamespace()
        setattr(holder, mark, {"quant_method": "bitsandbytes"})
        check_model(model, "here")


def test_enable_does_not_check_weights(pipe):
    """A user's pipeline may be quantised, and its weights may hold anything."""
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight[0, 0] = math.nan
    accelkit.enable(pipe, "uniform:3")
    accelkit.disable(pipe)
