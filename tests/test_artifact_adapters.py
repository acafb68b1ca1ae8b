"""Artifacts of low-rank adapters: they come back bit for bit or not at all."""

import copy
import json

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from test_artifact import SCHEDULE, outputs, same, weights

import accelkit
from accelkit import artifact
from accelkit.adapter import Adapter
from accelkit.errors import AccelkitError
from accelkit.switch import enabled_on


@pytest.fixture
def base(make_pipe, tmp_path):
    """A plain pipeline's directory."""
    make_pipe().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


LAYER = "transformer_blocks.2.attn1.to_q"


@pytest.fixture
def adapted(make_pipe, base, tmp_path):
    """An artifact of an adapter of one layer, and the pipeline that has it."""
    pipe = make_pipe()
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{LAYER}.lora_A.weight": torch.randn(2, 32, generator=rng),
        f"{LAYER}.lora_B.weight": torch.randn(32, 2, generator=rng),
    }
    adapter = Adapter(2, tensors)
    adapter.apply(pipe.transformer)
    accelkit.enable(pipe, SCHEDULE)
    folder = artifact.save(pipe, tmp_path / "adapted", base_model=str(base), adapter=adapter)
    return folder, pipe, tensors


def test_an_adapter_comes_back_bit_for_bit(adapted, base):
    folder, pipe, tensors = adapted
    assert same(load_file(folder / "accelkit.safetensors"), tensors)
    config = json.loads((folder / "accelkit.json").read_text())
    assert config["lora"] == {"rank": 2, "targets": [LAYER]}
    again = accelkit.from_pretrained(folder)
    assert str(enabled_on(again).schedule) == SCHEDULE
    assert same(weights(again), weights(pipe))
    assert torch.equal(outputs(again), outputs(pipe))
    assert not torch.equal(outputs(DiTPipeline.from_pretrained(base)), outputs(pipe))


def test_what_came_with_an_adapter_can_be_saved_whole(adapted, tmp_path):
    folder, pipe, _ = adapted
    whole = accelkit.save(accelkit.from_pretrained(folder), tmp_path / "whole")
    assert same(load_file(whole / "accelkit.safetensors"), weights(pipe))
    assert same(weights(accelkit.from_pretrained(whole)), weights(pipe))


@pytest.mark.parametrize("fault", ["shape", "name", "rank"])
def test_an_adapter_for_another_model_leaves_the_pipeline_alone(adapted, make_pipe, fault):
    folder, _, tensors = adapted
    if fault == "shape":
        tensors[f"{LAYER}.lora_A.weight"] = torch.zeros(2, 31)
    elif fault == "name":
        tensors = {key.replace("to_q", "to_x"): value for key, value in tensors.items()}
    else:
        config = json.loads((folder / "accelkit.json").read_text())
        config["lora"]["rank"] = 3
        (folder / "accelkit.json").write_text(json.dumps(config))
    save_file(tensors, folder / "accelkit.safetensors")
    pipe = make_pipe()
    before = weights(pipe)
    with pytest.raises(AccelkitError, match="does not fit this model"):
        accelkit.load(pipe, folder)
    assert enabled_on(pipe) is None
    assert same(weights(pipe), before)


def test_a_broken_record_of_an_adapter(adapted, make_pipe):
    folder, _, _ = adapted
    config = json.loads((folder / "accelkit.json").read_text())
    config["lora"] = {"ranks": 2}
    (folder / "accelkit.json").write_text(json.dumps(config))
    with pytest.raises(AccelkitError, match=r"accelkit\.json"):
        accelkit.load(make_pipe(), folder)


def test_an_adapter_is_not_added_twice(adapted, make_pipe):
    folder, pipe, _ = adapted
    loaded = make_pipe()
    accelkit.load(loaded, folder)
    accelkit.disable(loaded)
    with pytest.raises(AccelkitError, match="has the adapter of an artifact in its weights"):
        accelkit.load(loaded, folder)
    assert enabled_on(loaded) is None
    assert same(weights(loaded), weights(pipe))
    with pytest.raises(AccelkitError, match="has the adapter of an artifact in its weights"):
        accelkit.load(copy.deepcopy(loaded), folder)


def test_whole_weights_take_an_adapters_place(adapted, make_pipe, tmp_path):
    folder, pipe, _ = adapted
    plain = make_pipe()
    before = weights(plain)
    accelkit.enable(plain, SCHEDULE)
    whole = accelkit.save(plain, tmp_path / "whole", base_model=str(tmp_path / "base"))
    accelkit.disable(pipe)
    accelkit.load(pipe, whole)
    assert same(weights(pipe), before)
    accelkit.disable(pipe)
    accelkit.load(pipe, folder)  # added to weights that do not have it


def style(pipe, **options):
    """Load an adapter of PEFT's, as a user does."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q"], **options)
    peft.inject_adapter_in_model(config, pipe.transformer, "style")


@pytest.fixture
def styled(make_pipe):
    """A pipeline with an adapter of PEFT's."""
    pipe = make_pipe()
    style(pipe, init_lora_weights=False)
    return pipe


def test_with_an_adapter_of_pefts_nothing_is_saved(styled, tmp_path):
    accelkit.enable(styled, SCHEDULE)
    with pytest.raises(AccelkitError, match=r"carries PEFT adapters \(style\)"):
        accelkit.save(styled, tmp_path / "styled", base_model=str(tmp_path))
    assert not (tmp_path / "styled").exists()


def test_nor_with_the_layers_of_deleted_ones(styled, tmp_path):
    del styled.transformer.peft_config  # as delete_adapters does
    accelkit.enable(styled, SCHEDULE)
    with pytest.raises(AccelkitError, match="deleted ones, whose layers are left"):
        accelkit.save(styled, tmp_path / "styled", base_model=str(tmp_path))


@pytest.mark.parametrize("kind", ["adapter", "whole"])
def test_with_an_adapter_of_pefts_nothing_is_loaded(adapted, styled, tmp_path, kind):
    folder, pipe, _ = adapted
    if kind == "whole":
        folder = accelkit.save(pipe, tmp_path / "whole", base_model=str(tmp_path / "base"))
    with pytest.raises(AccelkitError, match=r"\(style\).*load them afterwards, or unload"):
        accelkit.load(styled, folder)
    assert enabled_on(styled) is None


def test_pefts_adapters_are_loaded_after_an_artifact(adapted, make_pipe):
    folder, pipe, _ = adapted
    loaded = make_pipe()
    accelkit.load(loaded, folder)
    style(loaded)  # which changes nothing yet
    torch.testing.assert_close(outputs(loaded), outputs(pipe))
    accelkit.disable(loaded)
    with pytest.raises(AccelkitError, match=r"\(style\)"):
        accelkit.load(loaded, folder)
