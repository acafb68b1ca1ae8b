"""Commands on an original-layout file, which records neither autoencoder nor heads."""

import json

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import accelkit
from accelkit.cli import app
from accelkit.errors import AccelkitError

ITS_OWN = ("--model", "dit.safetensors", "--vae", "vae", "--num-heads", "2")
BRIEF = ("--rounds", "1", "--timing-batch-size", "1", "--throughput", "")
SMALL = ("--steps", "2", "--batch-size", "2", "--eval-images", "2", "--eval-batch-size", "2")


@pytest.fixture(autouse=True)
def place(original, pipe, tmp_path, monkeypatch):
    """The working directory with the file, an autoencoder and two images; the network is off."""
    pipe.vae.save_pretrained(tmp_path / "vae")
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.effect_noise((8, 8), 50).save(tmp_path / "data" / name / "0.png")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def cli(*arguments):
    """Run a command in this process; its errors come through."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_fine_tuned_resumed_and_used_from_elsewhere(original, tmp_path, monkeypatch):
    train = ("--data", "data", "--schedule", "6@0.5,3@1", *SMALL, "--sampling-steps", "2")
    cli("finetune", *ITS_OWN, *train, "-o", "run")
    config = json.loads((tmp_path / "run" / "accelkit.json").read_text())
    base = [config[name] for name in ("base_model_name_or_path", "vae", "num_heads")]
    assert base == [str(original), str(tmp_path / "vae"), 2]
    tuned = load_file("run/accelkit.safetensors")
    (tmp_path / "run" / "accelkit.json").unlink()
    cli("finetune", "--resume", "latest", "-o", "run")  # all settings are the run's
    assert json.loads((tmp_path / "run" / "accelkit.json").read_text())["num_heads"] == 2
    again = load_file("run/accelkit.safetensors")
    assert all(torch.equal(tuned[k], again[k]) for k in tuned)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "run"
    cli("finetune", "--model", run, "--data", "../data", *train[2:], "-o", "further")
    assert json.loads((tmp_path / "elsewhere/further/accelkit.json").read_text())["vae"] == base[1]
    cli(
        *("bench", "--model", run, "--data", "../data", "--schedules", "uniform:2", "-n", "2"),
        *("--batch-size", "2", "--samplers", "ddim:2", "--baselines", "", *BRIEF, "-o", "bench"),
    )
    rows = json.loads((tmp_path / "elsewhere/bench/results.json").read_text())["rows"]
    assert [(r["method"], r["weights"]) for r in rows] == [
        ("full", "original"),
        ("uniform:2", "original"),
        ("6@0.5,3@1", "original"),
        ("6@0.5,3@1", "tuned"),
    ]


def test_samples_are_those_of_its_own_autoencoder(tmp_path):
    options = ("-n", "1", "--steps", "2", "--labels", "3")
    cli("sample", *ITS_OWN, *options, "-o", "one")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, latent_channels=4
        ).save_pretrained("other")
    cli("sample", *ITS_OWN[:3], "other", *ITS_OWN[4:], *options, "-o", "two")
    one, two = (np.asarray(Image.open(f"{d}/000000-class3.png")) for d in ("one", "two"))
    assert (one != two).any()
    pipe = accelkit.from_pretrained("dit.safetensors", vae="vae", num_heads=2)
    made = pipe(
        class_labels=[3],
        num_inference_steps=2,
        guidance_scale=1,
        generator=torch.Generator().manual_seed(0),
    )
    np.testing.assert_allclose(one.astype(int), np.asarray(made.images[0]), atol=1)


def test_compared_on_its_own_weights():
    done = cli(
        *("bench", *ITS_OWN, "--data", "data", "--schedules", "uniform:2", "-n", "2"),
        *("--batch-size", "2", "--samplers", "ddim:2", "--baselines", "", *BRIEF, "-o", "bench"),
        "--json",
    )
    assert [r["method"] for r in json.loads(done.stdout)["rows"]] == ["full", "uniform:2"]


@pytest.mark.parametrize("command", ["finetune", "sample", "bench"])
def test_neither_is_guessed(command, tmp_path):
    given = [command, "--model", "dit.safetensors", "-o", "out"]
    given += [] if command == "sample" else ["--data", "data"]
    with pytest.raises(AccelkitError, match="give num_heads"):
        cli(*given, "--vae", "vae")
    with pytest.raises(AccelkitError, match="sd-vae-ft-ema here or from the hub"):
        cli(*given, "--num-heads", "2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((c, ("--vae", "vae")) for c in ("finetune", "sample", "bench")),
        *((c, ("--num-heads", "2")) for c in ("finetune", "sample", "bench", "inspect")),
    ],
)
def test_refused_where_the_model_brings_its_own(command, option, pipe, tmp_path):
    pipe.save_pretrained("model")
    accelkit.enable(pipe, "uniform:3")
    accelkit.save(pipe, "tuned", base_model="model")
    before = sorted(tmp_path.iterdir())
    data = ["--data", "data"] if command in ("finetune", "bench") else []
    for model in ("model", "tuned", "builtin"):
        with pytest.raises(AccelkitError, match=f"{model} has its own settings; leave"):
            cli(command, "--model", model, *option, *data)
    assert sorted(tmp_path.iterdir()) == before
