"""Which changes of weights and modules are noticed, and which are not."""

import copy

import pytest
import torch
from torch import nn

from accelkit.backbones import stale


@pytest.fixture
def linear():
    return nn.Linear(3, 3)


def test_writes_are_counted_but_not_those_through_data(linear):
    seen = stale.writes(linear.parameters())
    assert seen.same()
    linear.weight.data.add_(1)
    assert seen.same()
    with torch.no_grad():
        linear.bias.add_(1)
    assert not seen.same()


def test_tensors_of_inference_mode_have_no_version():
    with torch.inference_mode():
        tensor = torch.zeros(2)
        seen = stale.writes([tensor])
        tensor.add_(1)
    assert seen.same()


def test_places_change_with_a_cast_but_not_with_a_write(linear):
    seen = stale.places(linear.parameters())
    with torch.no_grad():
        linear.weight.add_(1)
    assert seen.same()
    linear.double()
    assert not seen.same()


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.weight.detach().add_(1),
        lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.detach().clone())),
        lambda linear: setattr(linear.weight, "data", linear.weight.data.clone()),
        lambda linear: linear.half(),
    ],
    ids=["write", "parameter", "data", "cast"],
)
def test_contents_change_with_any_other_weight(linear, change):
    seen = stale.contents([linear], "weight", "bias")
    assert seen.same()
    assert seen.of([linear])
    assert not seen.of([linear, linear])
    assert not seen.of([copy.deepcopy(linear)])
    change(linear)
    assert not seen.same()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[1], "weight", nn.Parameter(model[1].weight.detach())),
        lambda model: model.__setitem__(0, nn.Identity()),
        lambda model: setattr(model[0], "forward", lambda x: x),
        lambda model: model[1].register_forward_hook(lambda *_: None),
        lambda model: model.register_forward_pre_hook(lambda *_: None),
        lambda model: model.train(),
    ],
    ids=["parameter", "child", "forward", "hook", "pre-hook", "training"],
)
def test_structure_is_children_parameters_and_hooks(change):
    model = nn.Sequential(nn.SiLU(), nn.Linear(2, 2)).eval()
    seen = stale.structure([model])
    with torch.no_grad():
        model[1].weight.add_(1)
    assert all(each.same() for each in seen)
    change(model)
    assert not all(each.same() for each in seen)
