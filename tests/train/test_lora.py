"""Adapters: their weights, that nothing else is trained, and resuming a run of them."""

import copy
import os
import signal

import pytest
import torch
from by_hand import train_by_hand
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from toy_run import CONFIG, LAYERS, RAGGED, build, fit, weights

import accelkit
from accelkit.artifact.adapter import Adapter, targets_of
from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError, Stopped
from accelkit.schedule import Schedule
from accelkit.train import lora
from accelkit.train.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_cpu")

LORA = TrainConfig(**{**CONFIG.to_dict(), "lora_rank": 2, "learning_rate": 1e-2, "steps": 4})


def tuned(path, **options):
    """The adapter of a run, and the model that it was added to."""
    model = build()
    kept = {}
    original = lora.Injected.adapter

    def adapter(self):
        kept["adapter"] = original(self)
        return kept["adapter"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora.Injected, "adapter", adapter)
        fit(path, LORA, RAGGED, model=model, **options)
    return kept["adapter"], model


def shown_by(model):
    with torch.no_grad():
        return model(torch.ones(1, 4, 4, 4), torch.tensor([5]), torch.tensor([1])).sample


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, its adapter, its model and the output at a preview in the end."""
    folder, shown = tmp_path_factory.mktemp("runs") / "whole", []
    options = {
        "checkpoint_every": 2,
        "preview": lambda step, model: shown.append(shown_by(model)),
        "preview_every": LORA.steps,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        return folder, *tuned(folder, **options), shown[0]


@pytest.fixture
def whole(run):
    return run[1:3]


def test_targets_are_the_blocks_linear_layers_but_no_modulation():
    names = targets_of(backbone_of(build()))
    assert len(names) == 6 * LAYERS
    assert {name.split(".", 2)[2] for name in names} == {
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    }


def test_only_the_adapters_targets_change(whole):
    adapter, model = whole
    before, after = weights(build()), weights(model)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in adapter.targets}
    assert adapter.targets == sorted(targets_of(backbone_of(model)))


def test_nothing_of_peft_stays(whole):
    _, model = whole
    assert all(type(m).__module__.split(".")[0] != "peft" for m in model.modules())
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


def test_the_adapter_is_what_was_added(whole):
    adapter, model = whole
    again = build()
    adapter.apply(again)
    for name, value in weights(again).items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_peft_itself_adds_the_same(whole):
    adapter, model = whole
    plain = build()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=adapter.targets)
    wrapped: PeftModel = get_peft_model(plain, config)
    own = wrapped.state_dict()
    for key, value in adapter.tensors.items():
        name, part, _ = key.rsplit(".", 2)
        own[f"base_model.model.{name}.{part}.default.weight"] = value
    wrapped.load_state_dict(own)
    merged = wrapped.merge_and_unload()
    for name, value in weights(merged).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_plain_loop_ends_with_the_same_adapter(whole):
    """The teacher's, as for a model whose weights are all trained."""
    model = build()
    targets = targets_of(backbone_of(model))
    with torch.random.fork_rng():
        torch.manual_seed(LORA.seed)
        config = LoraConfig(r=2, lora_alpha=2, target_modules=targets)
        inject_adapter_in_model(config, model, "plain")
    learned = train_by_hand(LORA, RAGGED, model).model.state_dict()
    for key, value in whole[0].tensors.items():
        expected = learned[key.replace(".weight", ".plain.weight")]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-4, msg=key)


def test_every_target_learned_where_a_deep_sample_came(whole):
    adapter, _ = whole
    learned = {n for n in adapter.targets if adapter.tensors[f"{n}.lora_B.weight"].any()}
    assert learned == set(adapter.targets)


def test_checkpoints_hold_the_adapters_alone(run):
    files = sorted(run[0].glob("checkpoints/*/model.safetensors"))
    assert [file.parent.name for file in files] == ["step-00000002", "step-00000004"]
    for file in files:
        held = load_file(file)
        assert held
        assert all(".lora_" in name for name in held)


def test_a_run_that_was_stopped_ends_with_the_same_adapter(tmp_path, whole):
    def stop(progress):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        tuned(tmp_path / "run", on_step=stop)
    adapter, model = tuned(tmp_path / "run")
    assert adapter.tensors.keys() == whole[0].tensors.keys()
    for key, value in whole[0].tensors.items():
        assert torch.equal(value, adapter.tensors[key]), key
    for name, value in weights(whole[1]).items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_preview_shows_the_teachers_adapter(run):
    model = copy.deepcopy(run[2])
    with accelkit.enable(model, Schedule.parse(RAGGED, LAYERS)):
        torch.testing.assert_close(run[3], shown_by(model), rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path, whole):
    config = TrainConfig(**{**LORA.to_dict(), "gradient_checkpointing": True})
    model = fit(tmp_path / "run", config, RAGGED, model=build())
    for name, value in weights(whole[1]).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=2e-5)


def test_a_model_with_adapters_already_is_refused():
    model = build()
    model.peft_config = {"style": None}
    with (
        pytest.raises(AccelkitError, match=r"carries PEFT adapters \(style\).*unload them first"),
        lora.injected(backbone_of(model), 2, 0),
    ):
        pass


def test_a_rank_above_every_layer_is_refused():
    backbone = backbone_of(build())
    layers = [backbone.model.get_submodule(name) for name in targets_of(backbone)]
    most = max(min(layer.weight.shape) for layer in layers)
    lora.check_rank(backbone, most)
    with pytest.raises(AccelkitError, match=f"give --lora-rank at most {most}"):
        lora.check_rank(backbone, most + 1)


def test_peft_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    lora.check(0)
    with pytest.raises(AccelkitError, match=r"accelkit\[lora\]") as caught:
        lora.check(4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_change_is_computed_in_float32(dtype):
    layer = nn.Sequential(nn.Linear(6, 4)).to(dtype)
    before = layer[0].weight.detach().double().clone()
    rng = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 6, generator=rng), torch.randn(4, 3, generator=rng)
    Adapter(3, {"0.lora_A.weight": down, "0.lora_B.weight": up}).apply(layer)
    expected = (before + up.double() @ down.double()).to(dtype)
    torch.testing.assert_close(layer[0].weight.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "tensors",
    [
        {"1.lora_A.weight": torch.ones(3, 6), "1.lora_B.weight": torch.ones(4, 3)},
        {"0.lora_A.weight": torch.ones(3, 5), "0.lora_B.weight": torch.ones(4, 3)},
        {"0.lora_A.weight": torch.ones(2, 6), "0.lora_B.weight": torch.ones(4, 2)},
        {"0.lora_A.weight": torch.ones(3, 6)},
    ],
    ids=["another layer", "another shape", "another rank", "half of it"],
)
def test_an_adapter_that_does_not_fit(tensors):
    layer = nn.Sequential(nn.Linear(6, 4))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(AccelkitError, match="does not fit this model"):
        Adapter(3, tensors).apply(layer)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
