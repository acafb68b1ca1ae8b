"""``accelkit train`` for every family that it can train."""

import itertools
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import accelkit
from accelkit.backbones import backbone_of
from accelkit.cli import app
from accelkit.errors import AccelkitError
from accelkit.jobs.fresh import ModelConfig, fresh_pipeline
from accelkit.models import UViTPipeline
from accelkit.runtime.switch import enabled_on
from accelkit.sample.generate import Sampling, generate

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}

RECIPE = """
steps = 2
batch_size = 4
[model]
family = "{family}"
layers = 4
heads = 2
head_dim = 8
num_classes = 10
[autoencoder]
channels = [8, 8, 8]
steps = 1
batch_size = 4
"""


@pytest.mark.parametrize(
    ("family", "kind", "schedule", "depth"),
    [
        ("dit", "DiTPipeline", "full", 4),
        ("dit", "DiTPipeline", "dvd-2p", 4),
        ("uvit", "UViTPipeline", "full", 2),
        ("uvit", "UViTPipeline", "2@0.5,0@1", 2),
    ],
)
def test_it_leaves_a_pipeline_of_its_family(family, kind, schedule, depth, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.format(family=family))
    given = ["train", "--recipe", "recipe.toml", "--schedule", schedule, "-o", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    pipe = accelkit.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipe).__name__ == kind
    backbone = backbone_of(pipe.transformer)
    assert (backbone.family, backbone.depth) == (family, depth)
    assert (backbone.num_classes, backbone.null_class) == (10, 10)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"]["family"] == family
    images = generate(pipe, [3, 7], [0, 1], Sampling("ddim", 2, guidance=2.0))
    assert images.shape == (2, 32, 32, 3)


def test_what_is_damaged_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.toml").write_text(RECIPE.format(family="dit"))
    given = ["train", "--recipe", "recipe.toml", "-o", "run"]
    assert CliRunner().invoke(app, given).exit_code == 0
    accelkit.from_pretrained("run/pipeline")
    again = [*given, "--resume", "latest"]
    assert CliRunner().invoke(app, again).exit_code == 0
    weights = "diffusion_pytorch_model.safetensors"
    for path in (f"run/pipeline/transformer/{weights}", f"run/pipeline/vae/{weights}"):
        with spoilt(Path(path)), pytest.raises(AccelkitError, match=f"{path} is damaged"):
            accelkit.from_pretrained("run/pipeline")
    path = Path("run/autoencoder") / weights
    with (
        spoilt(path),
        pytest.raises(AccelkitError, match=f"{path} is damaged.*; start over with --overwrite"),
    ):
        CliRunner().invoke(app, again, catch_exceptions=False)
    trained = {name: value * 1.01 for name, value in load_file(path).items()}
    save_file(trained, path, {"format": "pt"})
    with pytest.raises(AccelkitError, match="the autoencoder changed since the run in run began"):
        CliRunner().invoke(app, again, catch_exceptions=False)


@contextmanager
def spoilt(path):
    """Flip a bit of a file while entered."""
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    yield
    path.write_bytes(content)


def test_a_network_begins_as_its_authors_begin():
    vae = accelkit.from_pretrained("builtin").vae
    config = ModelConfig(family="uvit", layers=4, heads=2, head_dim=8, num_classes=10)
    pipe, again, other = (fresh_pipeline(config, vae, (), seed) for seed in (0, 0, 1))
    assert isinstance(pipe, UViTPipeline)
    weights, same, others = (list(p.transformer.parameters()) for p in (pipe, again, other))
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert not torch.equal(pipe.transformer.pos_embed, other.transformer.pos_embed)
    assert len(others) == len(weights)
    assert pipe.transformer.timestep_of(torch.tensor([0, 999])).tolist() == [1, 1000]
    assert pipe.transformer.mid_block.mlp.fc1.weight.abs().max() < 0.12  # N(0, 0.02^2), truncated


@pytest.mark.parametrize(
    ("command", "recipe", "expected"),
    [
        ("train", "digits_dit", {"layers": 28, "heads": 4}),
        ("train", "digits_uvit", {"family": "uvit", "layers": 12}),
        ("finetune", "digits_uvit_finetune", "runs/digits-uvit/pipeline"),
    ],
)
def test_recipes_are_read_by_their_command(command, recipe, expected):
    path = Path(__file__).parents[2] / "recipes" / f"{recipe}.toml"
    done = CliRunner().invoke(app, [command, "--recipe", str(path), "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    model = json.loads(done.stdout)["model"]
    assert model == expected if isinstance(model, str) else expected.items() <= model.items()


def drawn(folder, classes, each=4):
    """A folder of images for each class."""
    draw = np.random.default_rng(0)
    for label, place in itertools.product(range(classes), range(each)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(label) / f"{place}.png")
    return folder


@pytest.mark.parametrize("options", [[], ["--lora-rank", "2"]], ids=["", "lora"])
def test_a_u_vit_is_fine_tuned(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(family="uvit", layers=4, heads=2, head_dim=8, num_classes=2)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **BLOCKS)
    fresh_pipeline(config, vae, (), 0).save_pretrained("model")
    given = ["--schedule", "2@0.5,0@1", "--steps", "2", "--batch-size", "4", *options]
    given += ["--learning-rate", "1e-2", "--ema-decay", "0", "--eval-images", "2"]
    given += ["--eval-batch-size", "2", "--sampling-steps", "2", "-o", "run"]
    data = str(drawn(tmp_path / "data", 2))
    done = CliRunner().invoke(app, ["finetune", "--model", "model", "--data", data, *given])
    assert done.exit_code == 0, done.output

    pipe, before = accelkit.from_pretrained("run"), accelkit.from_pretrained("model")
    assert isinstance(pipe, UViTPipeline)
    assert str(enabled_on(pipe).schedule) == "2@0.5,0@1"
    own, other = pipe.transformer.state_dict(), before.transformer.state_dict()
    changed = {name for name in own if not torch.equal(own[name], other[name])}
    stored = json.loads(Path("run/accelkit.json").read_text())
    if options:
        assert changed == {f"{name}.weight" for name in stored["lora"]["targets"]}
    else:
        assert any("skip_linear" in name for name in changed)
        assert any("out_blocks.1.attn" in name for name in changed)
