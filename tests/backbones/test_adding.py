"""Adding a family: the lines that a user writes, and what follows from them."""

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

import accelkit
from accelkit.backbones import backbone_of, registry


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states, temb):
        return hidden_states + self.linear(hidden_states * temb)


class Network(ModelMixin, ConfigMixin):
    """Four blocks in two lists, which register_backbone has to be told about."""

    @register_to_config
    def __init__(self, width=8):
        super().__init__()
        self.time = nn.ModuleDict({"embed": nn.Linear(1, width)})
        self.early = nn.ModuleList(Block(width) for _ in range(3))
        self.late = nn.ModuleList([Block(width)])
        self.final = nn.Linear(width, width)

    def forward(self, hidden_states, timestep):
        temb = self.time["embed"](1 - timestep[:, None, None] / 1000)
        for block in (*self.early, *self.late):
            hidden_states = block(hidden_states, temb)
        return (self.final(hidden_states),)


class Named(accelkit.Backbone):
    family = "new"
    blocks = ("early", "late")
    exit = "final"
    time_embedders = ("time",)
    batched = ("hidden_states",)
    block_batched = ("temb",)


class Written(accelkit.Backbone):
    """The same by properties."""

    family = "new"
    batched = ("hidden_states",)
    block_batched = ("temb",)

    @property
    def blocks(self):
        return [*self.model.early, *self.model.late]

    @property
    def exit(self):
        return self.model.final


@pytest.mark.parametrize("family", [Named, Written])
@torch.no_grad()
def test_a_family_in_a_few_lines(family, monkeypatch):
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    accelkit.register_backbone(Network, family)
    torch.manual_seed(0)
    model = Network()
    x, t = torch.randn(3, 5, 8), torch.tensor([100.0, 990.0, 500.0])
    backbone = backbone_of(model)
    assert backbone.blocks == backbone.all_blocks == [*model.early, *model.late]
    assert backbone.exit is model.final
    expected = []
    for row, depth in enumerate((4, 1, 2)):
        hidden, temb = (
            x[row : row + 1],
            model.time["embed"](1 - t[row] / 1000 * torch.ones(1, 1, 1)),
        )
        for block in backbone.blocks[:depth]:
            hidden = block(hidden, temb)
        expected.append(model.final(hidden))
    with accelkit.enable(model, "4@0.2,2@0.9,1@1"):
        torch.testing.assert_close(model(x, t)[0], torch.cat(expected))


def test_names_of_modules():
    backbone = Named(Network())
    with backbone.training(freeze_time=True):
        assert not any(p.requires_grad for p in backbone.model.time.parameters())
    assert all(p.requires_grad for p in backbone.model.parameters())
    listed = type("Listed", (Named,), {"blocks": "early", "all_blocks": ("early", "late")})
    assert listed(backbone.model).blocks is backbone.model.early
    assert listed(backbone.model).depth == 3


def test_a_timestep_is_scaled_and_shifted():
    backward = type("Backward", (Named,), {"timestep_scale": -1e-3, "timestep_offset": 1.0})
    backbone = backward(Network())
    assert float(backbone.model_timestep(torch.tensor(250.0))) == pytest.approx(0.75)
    assert backbone.scheduler_timestep(0.75) == pytest.approx(250)
