"""A U-ViT through the commands: opened from a directory or an original file, converted, tuned."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file

import accelkit
from accelkit.errors import AccelkitError
from accelkit.jobs.convert import convert
from accelkit.layouts.original import load_original, save_original, to_original
from accelkit.models import UViTPipeline, UViTTransformer2DModel
from accelkit.noise.vp_sde import VPSDEEulerMaruyamaScheduler
from accelkit.runtime.switch import enabled_on


def network(channels=3, **config):
    torch.manual_seed(0)
    return UViTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        timestep_scale=0.999,
        timestep_offset=0.999,
        **config,
    ).eval()


def drawn(pipe):
    rng = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(batch_size=2, num_inference_steps=3, generator=rng, output_type="pt").images


def test_a_directory_is_opened_as_what_it_is(tmp_path):
    pipe = UViTPipeline(network(), VPSDEEulerMaruyamaScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipe")
    again = accelkit.from_pretrained(tmp_path / "pipe")
    assert isinstance(again, UViTPipeline)
    assert torch.equal(drawn(again), drawn(pipe))


def test_an_artifact_of_a_uvit_comes_back(tmp_path):
    UViTPipeline(network(), VPSDEEulerMaruyamaScheduler()).save_pretrained(tmp_path / "pipe")
    pipe = accelkit.from_pretrained(tmp_path / "pipe")
    accelkit.enable(pipe, "D4")
    with torch.no_grad():
        pipe.transformer.norm.bias.add_(0.5)  # tuned
    accelkit.save(pipe, tmp_path / "tuned")
    again = accelkit.from_pretrained(tmp_path / "tuned")
    assert enabled_on(again).schedule == enabled_on(pipe).schedule
    assert torch.equal(drawn(again), drawn(pipe))


def test_an_original_file_in_pixels_needs_no_autoencoder(tmp_path):
    model = network()
    save_original(model, tmp_path / "uvit.pth")
    pipe = accelkit.from_pretrained(tmp_path / "uvit.pth", num_heads=2)
    assert isinstance(pipe, UViTPipeline)
    assert pipe.vae is None
    assert isinstance(pipe.scheduler, VPSDEEulerMaruyamaScheduler)
    for name, value in model.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], value)


def test_an_original_file_in_latents_takes_one(tmp_path):
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=1).save_pretrained(tmp_path / "vae")
    save_original(network(4), tmp_path / "uvit.pth")
    pipe = accelkit.from_pretrained(tmp_path / "uvit.pth", num_heads=2, vae=str(tmp_path / "vae"))
    assert isinstance(pipe.vae, AutoencoderKL)


def test_what_a_conversion_makes_is_opened(tmp_path):
    save_original(network(), tmp_path / "uvit.pth")
    convert(tmp_path / "uvit.pth", tmp_path / "network", 2, False, False)
    pipes = [accelkit.from_pretrained(tmp_path / "uvit.pth", num_heads=2)]
    pipes.append(accelkit.from_pretrained(tmp_path / "network"))
    assert type(pipes[0].scheduler) is type(pipes[1].scheduler)
    assert torch.equal(*map(drawn, pipes))
    accelkit.enable(pipes[1], "D4")
    accelkit.save(pipes[1], tmp_path / "tuned", base_model=str(tmp_path / "network"))
    assert enabled_on(accelkit.from_pretrained(tmp_path / "tuned")) is not None


def test_weights_of_a_distributed_training(tmp_path):
    state = to_original(network())
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "ddp.pth")
    opened = load_original(tmp_path / "ddp.pth", num_heads=2)
    for name, value in to_original(opened).items():
        assert torch.equal(value, state[name])
    state["out_blocks.999.x"] = torch.zeros(1)
    torch.save(state, tmp_path / "stray.pth")
    with pytest.raises(AccelkitError, match=r"out_blocks\.999\.x") as caught:
        load_original(tmp_path / "stray.pth", num_heads=2)
    assert "missing: none" in str(caught.value)


def test_conversion_there_and_back(tmp_path):
    save_original(network(), tmp_path / "one.safetensors")
    folder = convert(tmp_path / "one.safetensors", tmp_path / "folder", 2, False, False)
    assert json.loads((folder / "config.json").read_text())["_class_name"].startswith("UViT")
    back = convert(folder, tmp_path / "two.safetensors", None, False, False)
    one, two = load_file(tmp_path / "one.safetensors"), load_file(back)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_has_no_original_layout_is_named(tmp_path):
    DDIMScheduler().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(AccelkitError, match=r"holds a FluxTransformer2DModel; .*UViT"):
        convert(tmp_path, tmp_path / "x.safetensors", None, False, False)
