"""Artifacts of low-rank adapters: they come back bit for bit or not at all."""

import copy
import json

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from test_artifact import SCHEDULE, outputs, same, weights
from torch import nn

import accelkit
from accelkit.artifact import artifact
from accelkit.artifact.adapter import Adapter
from accelkit.errors import AccelkitError
from accelkit.runtime.switch import enabled_on


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
    assert config["lora"].keys() == {"rank", "targets", "probes"}
    assert (config["lora"]["rank"], config["lora"]["targets"]) == (2, [LAYER])
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
        del config["sha256"]
        (folder / "accelkit.json").write_text(json.dumps(config))
    save_file(tensors, folder / "accelkit.safetensors")
    pipe = make_pipe()
    before = weights(pipe)
    with pytest.raises(AccelkitError, match="does not fit this model"):
        accelkit.load(pipe, folder)
    assert enabled_on(pipe) is None
    assert same(weights(pipe), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3])
def test_an_adapter_that_cannot_be_computed_with_is_refused(adapted, make_pipe, value):
    folder, _, tensors = adapted
    name = f"{LAYER}.lora_B.weight"
    tensors[name] = torch.full((32, 2), value)
    save_file(tensors, folder / "accelkit.safetensors")
    pipe = make_pipe()
    before = weights(pipe)
    words = "stored as int64" if value == 3 else "NaN or infinite"
    with pytest.raises(AccelkitError, match=rf"{name} in .*accelkit\.safetensors .*{words}"):
        accelkit.load(pipe, folder)
    assert enabled_on(pipe) is None
    assert same(weights(pipe), before)


def test_a_broken_record_of_an_adapter(adapted, make_pipe):
    folder, _, _ = adapted
    config = json.loads((folder / "accelkit.json").read_text())
    config["lora"] = {"ranks": 2}
    del config["sha256"]
    (folder / "accelkit.json").write_text(json.dumps(config))
    with pytest.raises(AccelkitError, match=r"accelkit\.json"):
        accelkit.load(make_pipe(), folder)


def test_an_adapter_is_not_added_twice(adapted, make_pipe, tmp_path):
    folder, pipe, _ = adapted
    loaded = make_pipe()
    accelkit.load(loaded, folder)
    accelkit.disable(loaded)
    loaded.save_pretrained(tmp_path / "kept")
    for each in (loaded, copy.deepcopy(loaded), DiTPipeline.from_pretrained(tmp_path / "kept")):
        with pytest.raises(AccelkitError, match="has the adapter in its weights already"):
            accelkit.load(each, folder)
        assert enabled_on(each) is None
        assert same(weights(each), weights(pipe))


def test_nor_to_other_weights(adapted, make_pipe, tmp_path):
    """Be they tuned as a whole, or of another model of that size."""
    folder, _, _ = adapted
    pipe = make_pipe()
    with torch.no_grad():
        pipe.transformer.get_parameter(f"{LAYER}.weight").add_(0.01)
    before = weights(pipe)
    with pytest.raises(AccelkitError, match=f"trained for other weights.*as those of {LAYER}"):
        accelkit.load(pipe, folder)
    assert enabled_on(pipe) is None
    assert same(weights(pipe), before)


def test_weights_that_were_put_back_take_it_again(adapted, make_pipe):
    folder, pipe, _ = adapted
    loaded = make_pipe()
    original = weights(loaded)
    accelkit.load(loaded, folder)
    accelkit.disable(loaded)
    loaded.transformer.load_state_dict(original)
    accelkit.load(loaded, folder)
    assert same(weights(loaded), weights(pipe))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_dtype_take_it_once(adapted, make_pipe, dtype):
    folder, pipe, _ = adapted
    loaded = make_pipe()
    loaded.transformer.to(dtype)
    accelkit.load(loaded, folder)
    found = loaded.transformer.get_parameter(f"{LAYER}.weight").float()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, weights(pipe)[f"{LAYER}.weight"], rtol=eps, atol=eps)
    accelkit.disable(loaded)
    with pytest.raises(AccelkitError, match="already"):
        accelkit.load(loaded, folder)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16, torch.float16])
def test_what_it_is_for_is_told_in_every_dtype(base, cast, scale):
    """Trained beside weights of one dtype, loaded beside the same ones of another."""
    torch.manual_seed(0)
    original = nn.Sequential(*(nn.Linear(64, 48) for _ in range(40)))
    tensors = {}
    for name in map(str, range(40)):
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 64)
        tensors[f"{name}.lora_B.weight"] = scale * torch.randn(48, 4)
    adapter = Adapter(4, tensors)
    tuned = copy.deepcopy(original).to(base)
    adapter.apply(tuned)
    probes = json.loads(json.dumps(adapter.about(tuned)))["probes"]
    assert 16 < len(probes) <= 32  # two of a layer
    other = copy.deepcopy(original).to(cast)
    adapter.check_base(other, probes)
    adapter.apply(other)
    with pytest.raises(AccelkitError, match="already"):
        adapter.check_base(other, probes)


@pytest.mark.parametrize("lora", [7, {}, {"rank": 2}])
def test_what_is_told_of_an_adapter_is_whole(adapted, make_pipe, lora):
    folder, _, _ = adapted
    config = json.loads((folder / "accelkit.json").read_text())
    del config["sha256"]
    (folder / "accelkit.json").write_text(json.dumps({**config, "lora": lora}))
    with pytest.raises(AccelkitError, match="is not of format 1"):
        accelkit.load(make_pipe(), folder)


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
