"""What a run's settings accept, and the loss weight they describe."""

import json
import math
from dataclasses import fields

import pytest
import torch

from accelkit.errors import AccelkitError
from accelkit.train.config import TrainConfig

NAN, INF = math.nan, math.inf
REFUSED = {
    "steps": [0, -1, NAN],
    "batch_size": [0, -8],
    "learning_rate": [0.0, -1e-4, NAN, INF],
    "lr_schedule": ["linear", "", "Cosine"],
    "lr_warmup_steps": [-1],
    "weight_decay": [-0.1, NAN, INF],
    "max_grad_norm": [0.0, -1.0, NAN, INF],
    "ema_decay": [-0.1, 1.0, 1.5, NAN],
    "label_dropout": [-0.1, 1.1, NAN],
    "loss_weight": ["snr", ""],
    "loss_weight_until": [-0.1, 1.1, NAN],
    "timestep_density": ["normal", ""],
    "logit_mean": [NAN, INF],
    "logit_std": [0.0, -1.0, NAN, INF],
    "intermediate_weight": [-0.1, NAN, INF],
    "intermediate_match": ["closest", ""],
    "intermediate_head": ["separate", ""],
    "lora_rank": [-1],
    "gradient_accumulation": [0, -1],
    "mixed_precision": ["fp8", "float16", "", False],
    "seed": [-1, 2**32],
}
ACCEPTED = {
    "steps": [1],
    "batch_size": [1],
    "learning_rate": [1e-12, 3],
    "lr_schedule": ["constant", "cosine"],
    "lr_warmup_steps": [0, 5],
    "weight_decay": [0.0, 0.1],
    "max_grad_norm": [1e-3, 5],
    "ema_decay": [0.0, 0.5],
    "label_dropout": [0.0, 1.0],
    "loss_weight": ["ones", "ramp"],
    "loss_weight_until": [0.0, 1.0],
    "timestep_density": ["uniform", "logit-normal"],
    "logit_mean": [-0.5, 0.0],
    "logit_std": [0.5, 1],
    "intermediate_weight": [0.0, 1, 2.5],
    "intermediate_match": ["nearest", "relative", "middle", "random"],
    "intermediate_head": ["shared", "own"],
    "lora_rank": [0, 64],
    "gradient_accumulation": [1, 4],
    "mixed_precision": ["no", "bf16", "fp16"],
    "seed": [0, 2**32 - 1],
}
WRONG_TYPES = {
    "steps": ["200", 2.5, INF, True],
    "batch_size": [64.0, "64"],
    "learning_rate": ["1e-4"],
    "lr_warmup_steps": [1.5],
    "freeze_time_embedder": ["no", 1],
    "gradient_accumulation": [2.0],
    "intermediate_weight": ["1"],
    "lora_rank": [4.0],
    "gradient_checkpointing": ["false", 0],
    "seed": [0.5],
}


def pairs(table):
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), pairs(REFUSED))
def test_refused(name, value):
    with pytest.raises(AccelkitError, match=f"^{name} must be .*, got {value!r}$"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), pairs(ACCEPTED))
def test_accepted(name, value):
    assert getattr(TrainConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), pairs(WRONG_TYPES))
def test_wrong_types(name, value):
    with pytest.raises((TypeError, AccelkitError), match=name):
        TrainConfig(**{name: value})


def test_no_field_is_left_out_of_these_tests():
    flags = {"freeze_time_embedder", "gradient_checkpointing"}
    assert {f.name for f in fields(TrainConfig)} == set(REFUSED) | flags == set(ACCEPTED) | flags


def test_round_trip_through_json():
    config = TrainConfig(steps=7, lr_schedule="cosine", gradient_checkpointing=True, seed=3)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert set(config.to_dict()) == {f.name for f in fields(TrainConfig)}


def test_part_of_the_settings():
    assert TrainConfig.from_dict({"steps": 9}) == TrainConfig(steps=9)


def test_unknown_names():
    with pytest.raises(AccelkitError, match=r"unknown training settings: epochs, lr$"):
        TrainConfig.from_dict({"steps": 9, "lr": 1e-4, "epochs": 3})


def test_values_from_a_dictionary_are_checked():
    with pytest.raises(AccelkitError, match="steps must be"):
        TrainConfig.from_dict({"steps": 0})


LEVELS = torch.tensor([0.0, 0.25, 1.0])


@pytest.mark.parametrize("step", [0, 50, 99])
def test_weight_ones(step):
    assert TrainConfig(steps=100).weight_at(step, LEVELS).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("until", "ramped", "plain"), [(1 / 3, [0, 33], [34, 99]), (0.0, [], [0]), (1.0, [0, 99], [])]
)
def test_weight_ramps_until_its_share_of_the_run(until, ramped, plain):
    config = TrainConfig(steps=100, loss_weight="ramp", loss_weight_until=until)
    for step in ramped:
        assert config.weight_at(step, LEVELS).tolist() == pytest.approx([0.1, 0.325, 1.0])
    for step in plain:
        assert config.weight_at(step, LEVELS).tolist() == [1, 1, 1]
