"""Configs with sizes that no model has are refused before a network is built."""

import json
import time

import pytest
import torch

import accelkit
from accelkit.errors import AccelkitError, AccelkitWarning

WRONG = {
    "a zero too many layers": ("transformer", {"num_layers": 10**9}, "num_layers = 1000000000"),
    "fewer than none": ("transformer", {"num_layers": -1}, "num_layers = -1, expected 0 to 1,000"),
    "layers of text": ("transformer", {"num_layers": "x"}, "cannot read the model"),
    "wide heads": ("transformer", {"attention_head_dim": 10**9}, "attention_head_dim = 1000000000"),
    "huge latents": ("transformer", {"sample_size": 10**9}, "sample_size = 1000000000"),
    "no heads": ("transformer", {"num_attention_heads": 0}, "cannot read the model"),
    "autoencoder": ("vae", {"layers_per_block": 10**9}, "layers_per_block = 1000000000"),
    "in a list": ("vae", {"block_out_channels": [8, 10**9]}, "block_out_channels = 1000000000"),
    "no levels": ("vae", {"block_out_channels": []}, "cannot read the model"),
    "scheduler": ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
}


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_sizes_that_no_model_has(model):
    for part, change, words in WRONG.values():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        path = model / part / name
        whole = path.read_text()
        edit(path, **change)
        began = time.monotonic()
        with pytest.raises(AccelkitError) as caught:
            accelkit.from_pretrained(model)
        assert words in str(caught.value)
        assert time.monotonic() - began < 60  # building the model would take hours
        path.write_text(whole)


def test_configs_that_are_no_objects(model):
    for place in ("transformer/config", "vae/config", "model_index"):
        path = model / f"{place}.json"
        whole = path.read_text()
        for content in ("[]", "null", "3", "{", "[" * 50_000):
            path.write_text(content)
            with pytest.raises(AccelkitError, match="cannot read"):
                accelkit.from_pretrained(model)
        path.write_text(whole)


def test_a_network_alone(model):
    (model / "transformer" / "config.json").write_text("[]")
    with pytest.raises(AccelkitError, match="holds a list, expected an object"):
        accelkit.from_pretrained(model / "transformer")


def test_fewer_layers_than_the_weights_have(model):
    edit(model / "transformer" / "config.json", num_layers=2)
    with pytest.warns(AccelkitWarning, match="have no place in a DiT"):
        accelkit.from_pretrained(model)


def test_infinities_pass(model):
    # DPMSolverMultistepScheduler saves them
    edit(model / "scheduler" / "scheduler_config.json", lambda_min_clipped=float("-inf"))
    assert torch.isfinite(next(accelkit.from_pretrained(model).transformer.parameters())).all()
