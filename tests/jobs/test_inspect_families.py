"""``accelkit inspect`` on pipelines of other families than DiT."""

import json

import pytest
from typer.testing import CliRunner

from accelkit.backbones import backbone_of
from accelkit.cli import app


def cli(*arguments):
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def unet(tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDIMPipeline(model, DDIMScheduler()).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet", model


def test_a_unet(unet):
    path, model = unet
    seen = json.loads(cli("inspect", "--model", path, "--schedule", "4@0.5,0@1", "--json"))
    assert (seen["family"], seen["class"]) == ("unet", "UNet2DModel")
    assert (seen["blocks"], seen["blocks_in_all"], seen["least_depth"]) == (4, 4, 0)
    sizes = [sum(p.numel() for p in b.parameters()) for b in backbone_of(model).blocks]
    assert seen["block_parameters"] == [min(sizes), max(sizes)]
    assert seen["cost_of_a_sample"] == "3 x 8 x 8"
    costs = seen["gmacs_by_depth"]
    assert len(costs) == 5
    assert seen["mac_saving"] == f"{1 - (costs[4] + costs[0]) / 2 / costs[4]:.2%}"
    shown = cli("inspect", "--model", path)
    assert "least depth" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.count("│") == 4] == list("01234")


def test_a_transformer_that_was_looked_at(pipe, tmp_path, monkeypatch):
    from accelkit.backbones import registry

    monkeypatch.delitem(registry._families, "DiTTransformer2DModel")
    pipe.save_pretrained(tmp_path / "dit")
    seen = json.loads(cli("inspect", "--model", tmp_path / "dit", "--json"))
    assert seen["family"] == "DiTTransformer2DModel"
    assert seen["found_by"] == "watching a call"
    assert seen["block_lists"] == "transformer_blocks"
    assert seen["exit"] == "norm_out"
    assert seen["model_timestep"] == "t, t being the scheduler's"
    assert (seen["least_depth"], seen["blocks"]) == (1, 6)
    monkeypatch.undo()
    known = json.loads(cli("inspect", "--model", tmp_path / "dit", "--json"))
    assert seen["gmacs_by_depth"] == known["gmacs_by_depth"]


def test_a_cost_that_cannot_be_counted(unet, monkeypatch):
    from accelkit.backbones.unet import UNet
    from accelkit.errors import AccelkitError

    def example(self, batch=1, device="meta"):
        raise AccelkitError("no call of it is known")

    monkeypatch.setattr(UNet, "example", example)
    seen = json.loads(cli("inspect", "--model", unet[0], "--json"))
    assert seen["cost"] == "not counted: no call of it is known"
    assert "gmacs_by_depth" not in seen
    assert "no call of it is known" in cli("inspect", "--model", unet[0])
