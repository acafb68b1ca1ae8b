"""``accelkit sample``, ``convert`` and ``inspect`` on tiny models."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import accelkit
from accelkit.cli import app
from accelkit.errors import AccelkitError
from accelkit.jobs.sample import parse_labels
from accelkit.layouts.original import restore_numerics

SCHEDULE = "6@0.3,4@0.6,2@1"


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tuned(model, tmp_path):
    pipe = DiTPipeline.from_pretrained(model)
    accelkit.enable(pipe, SCHEDULE)
    return accelkit.save(pipe, tmp_path / "tuned")


def cli(*arguments):
    """Run a command in this process; its errors come through."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# --- sample


def sample(model, output, *arguments):
    """The images by file name, without the grid."""
    cli("sample", "--model", model, "-o", output, "--steps", "3", *arguments)
    return {p.name: pixels(p) for p in sorted(output.glob("0*.png"))}


def test_files_grid_and_index(model, tmp_path):
    done = cli(
        *("sample", "--model", model, "-o", tmp_path / "s", "--steps", "2", "-n", "5"),
        *("--labels", "7,2", "--seed", "30", "--json"),
    )
    names = [f"{i:06d}-class{c}.png" for i, c in enumerate((7, 2, 7, 2, 7))]
    assert json.loads(done.stdout) == {"files": [str(tmp_path / "s" / n) for n in names]}
    found = {p.name for p in (tmp_path / "s").iterdir()}
    assert found == {*names, "grid.png", "samples.json"}
    index = json.loads((tmp_path / "s" / "samples.json").read_text())
    assert [(r["file"], r["label"], r["seed"]) for r in index["images"]] == [
        (n, c, 30 + i) for i, (n, c) in enumerate(zip(names, (7, 2, 7, 2, 7), strict=True))
    ]
    assert index["schedule"] is None
    assert index["sampling"]["steps"] == 2
    grid = pixels(tmp_path / "s" / "grid.png")  # three columns, two rows, lines of two pixels
    assert grid.shape == (2 * 10 + 2, 3 * 10 + 2, 3)
    np.testing.assert_array_equal(grid[2:10, 12:20], pixels(tmp_path / "s" / names[1]))


def test_by_its_own_modules_or_compiled_the_images_are_the_same(tuned, tmp_path):
    fused = sample(tuned, tmp_path / "fused", "-n", "3")
    for name, options in {"own": ("--kernels", "off"), "compiled": ("--compile", "eager")}.items():
        images = sample(tuned, tmp_path / name, "-n", "3", *options)
        assert images.keys() == fused.keys()
        for file, image in images.items():
            assert abs(image - fused[file]).max() <= 1
        index = json.loads((tmp_path / name / "samples.json").read_text())
        assert index["schedule"]["name"] == SCHEDULE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kernels", "on"), "kernels='on'; expected one of auto, off"),
        (("--compile", "graphs"), "CUDA graphs need a CUDA device"),
        (("--compile", "fast"), "mode='fast'; expected 'graphs' or a backend"),
        (("--compile", "eager", "--kernels", "off"), "kernels are off"),
    ],
)
def test_paths_that_there_are_not(tuned, tmp_path, options, message):
    with pytest.raises(AccelkitError, match=message):
        cli("sample", "--model", tuned, "-o", tmp_path / "s", *options)
    assert not (tmp_path / "s").exists()


def test_compiling_needs_a_schedule(model, tmp_path):
    with pytest.raises(AccelkitError, match="runs no schedule"):
        cli("sample", "--model", model, "-o", tmp_path / "s", "--compile", "eager")


def test_inspect_tells_the_path_of_every_block(model):
    seen = json.loads(cli("inspect", "--model", model, "--json").stdout)
    assert seen["path_of_blocks"] == "0-5 fused, PyTorch operators"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(model, tmp_path, sampler):
    options = ("-n", "5", "--labels", "0-9", "--sampler", sampler, "--guidance", "2")
    whole = sample(model, tmp_path / "a", *options)
    for batch in (1, 2):
        parts = sample(model, tmp_path / f"b{batch}", *options, "--batch-size", batch)
        assert parts.keys() == whole.keys()
        assert max(np.abs(parts[n] - whole[n]).max() for n in whole) <= 1  # a byte's rounding
    later = sample(model, tmp_path / "c", *options[2:], "-n", "1", "--seed", "3", "--labels", "3")
    assert np.abs(later["000000-class3.png"] - whole["000003-class3.png"]).max() <= 1
    assert np.abs(whole["000000-class0.png"] - whole["000001-class1.png"]).max() > 1


def test_the_schedule_asked_for_runs_instead_of_the_tuned_one(model, tuned, tmp_path):
    own = sample(tuned, tmp_path / "own")
    index = json.loads((tmp_path / "own" / "samples.json").read_text())
    assert index["schedule"]["intervals"][0] == {"until": 0.3, "depth": 6}
    full = sample(tuned, tmp_path / "full", "--schedule", "full", "--kernels", "off")
    plain = sample(model, tmp_path / "plain")  # the same weights here
    same = sample(model, tmp_path / "same", "--schedule", SCHEDULE)
    assert all(np.array_equal(full[n], plain[n]) for n in plain)
    assert all(np.array_equal(own[n], same[n]) for n in own)
    assert any((own[n] != full[n]).any() for n in own)


def test_what_is_there_is_kept(model, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("mine")
    with pytest.raises(AccelkitError, match="not an empty directory"):
        sample(model, tmp_path / "s")
    assert len(sample(model, tmp_path / "s", "--overwrite", "-n", "2")) == 2
    assert (tmp_path / "s" / "mine.txt").read_text() == "mine"


def test_overwriting_leaves_nothing_of_a_longer_run(model, tmp_path):
    sample(model, tmp_path / "s", "-n", "5", "--labels", "7")
    foreign = ("mine.txt", "000004-class7.jpg", "x000004-class7.png", "000001-class7.png.bak")
    for name in foreign:
        (tmp_path / "s" / name).write_text("mine")
    (tmp_path / "s" / "mine.partial").mkdir()
    for name in ("000002-class7.png.partial", "000007-class7.png.partial"):
        (tmp_path / "s" / name).mkdir()  # of a killed run, as this version leaves it
    (tmp_path / "s" / "000003-class7.png.partial").write_text("of a killed run")
    sample(model, tmp_path / "s", "--overwrite", "-n", "2", "--labels", "8")
    left = {p.name for p in (tmp_path / "s").iterdir()}
    made = {"000000-class8.png", "000001-class8.png", "grid.png", "samples.json"}
    assert left == {*made, *foreign, "mine.partial"}


def test_what_is_refused_loses_nothing(model, tmp_path):
    before = sample(model, tmp_path / "s", "-n", "2").keys()
    for wrong in (("--labels", "2000"), ("--sampler", "euler"), ("--schedule", "D5")):
        with pytest.raises(AccelkitError):
            sample(model, tmp_path / "s", "--overwrite", "-n", "1", *wrong)
        assert {p.name for p in (tmp_path / "s").glob("0*.png")} == before


def test_without_labels_the_classes_that_have_names_are_gone_round(model, tmp_path):
    index = json.loads((model / "model_index.json").read_text())
    names = {"4": "cat", "9": "dog, hound", "2": "emu"}
    (model / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    files = sample(model, tmp_path / "s", "-n", "4")
    assert [n.split("-")[1] for n in files] == ["class2.png", "class4.png", "class9.png",
                                                "class2.png"]  # fmt: skip


def test_labels():
    assert parse_labels("3,1,4") == [3, 1, 4]
    assert parse_labels("0-3, 7") == [0, 1, 2, 3, 7]
    assert parse_labels("5-5") == [5]
    for text in ("", ",", "a", "1,,2", "-1", "1-", "3-1", "1.5", "²"):
        with pytest.raises(AccelkitError, match=r"labels .* e\.g\."):
            parse_labels(text)


# --- convert


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_there_and_back(original, tmp_path, suffix):
    cli("convert", original, tmp_path / "dit", "--num-heads", "2")
    cli("convert", tmp_path / "dit", tmp_path / f"back{suffix}")
    back = tmp_path / f"back{suffix}"
    there = load_file(original)
    again = load_file(back) if suffix != ".pt" else torch.load(back, weights_only=True)
    assert there.keys() == again.keys()
    assert all(torch.equal(v, again[k]) for k, v in there.items())
    own = accelkit.load_original(original, num_heads=2)
    read = DiTTransformer2DModel.from_pretrained(tmp_path / "dit")
    restore_numerics(read)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=draw)
    t, y = torch.tensor([900, 3]), torch.tensor([1, 1000])
    with torch.no_grad():
        a, b = (m(x, timestep=t, class_labels=y).sample for m in (own, read))
    assert torch.equal(a, b)


def test_what_was_converted_and_damaged_is_refused(original, pipe, tmp_path):
    pipe.vae.save_pretrained(tmp_path / "vae")
    cli("convert", original, tmp_path / "dit", "--num-heads", "2")
    cli("convert", tmp_path / "dit", tmp_path / "back.safetensors")
    for model, path, options in (
        ("dit", "dit/diffusion_pytorch_model.safetensors", {}),
        ("back.safetensors", "back.safetensors", {"num_heads": 2}),
    ):
        opens = partial(accelkit.from_pretrained, tmp_path / model, vae=str(tmp_path / "vae"))
        opens(**options)
        content = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(AccelkitError, match=rf"{path} is damaged, it does not match"):
            opens(**options)


def test_a_killed_conversion_is_done_again(original, tmp_path):
    part = tmp_path / "dit.partial" / "dit"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{")
    cli("convert", original, tmp_path / "dit", "--num-heads", "2")
    assert DiTTransformer2DModel.from_pretrained(tmp_path / "dit")
    assert not (tmp_path / "dit.partial").exists()


def test_a_pipelines_directory_is_converted_too(original, pipe, tmp_path):
    pipe.register_modules(transformer=accelkit.load_original(original, num_heads=2))
    pipe.save_pretrained(tmp_path / "pipeline")
    cli("convert", tmp_path / "pipeline", tmp_path / "back.safetensors")
    there, again = load_file(original), load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(v, again[k]) for k, v in there.items())


def test_what_would_compute_otherwise_is_converted_on_demand_only(make_dit, tmp_path):
    model = make_dit()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(tmp_path / "d")
    with pytest.raises(AccelkitError, match="frequencies"):
        cli("convert", tmp_path / "d", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    cli("convert", tmp_path / "d", tmp_path / "x.safetensors", "--allow-inexact")
    assert (tmp_path / "x.safetensors").is_file()


def test_a_target_is_replaced_on_demand_only(original, tmp_path):
    cli("convert", original, tmp_path / "dit", "--num-heads", "2")
    (tmp_path / "dit" / "mine.txt").write_text("mine")
    with pytest.raises(AccelkitError, match="exists; replace it with --overwrite"):
        cli("convert", original, tmp_path / "dit", "--num-heads", "2")
    assert (tmp_path / "dit" / "mine.txt").is_file()
    with pytest.raises(AccelkitError, match=r"holds mine\.txt, which no conversion wrote"):
        cli("convert", original, tmp_path / "dit", "--num-heads", "2", "--overwrite")
    (tmp_path / "dit" / "mine.txt").unlink()
    cli("convert", original, tmp_path / "dit", "--num-heads", "2", "--overwrite")
    with pytest.raises(AccelkitError, match="no conversion wrote"):
        cli("convert", original, original.parent, "--num-heads", "2", "--overwrite")
    assert original.is_file()
    (tmp_path / "file").write_text("a file, where a directory goes")
    cli("convert", original, tmp_path / "file", "--num-heads", "2", "--overwrite")
    assert (tmp_path / "file" / "config.json").is_file()
    assert not list(tmp_path.glob("*.partial*"))


def test_convert_refuses(original, model, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, target, words in (
        (original, "x.safetensors", "target is a directory"),
        (tmp_path / "gone.pt", "x", "does not exist"),
        (tmp_path / "empty", "x.pt", "no config.json"),
        (
            model / "vae",
            "x.pt",
            "holds a AutoencoderKL; the networks with an original layout are DiT",
        ),
        (model, "x", "suffix"),
        (model, "nowhere/x.pt", "not a folder|frequencies"),
    ):
        with pytest.raises(AccelkitError, match=words):
            cli("convert", source, tmp_path / target, "--num-heads", "2")
        assert not (tmp_path / target).exists()


# --- inspect


def inspect(*arguments):
    return json.loads(cli("inspect", *arguments, "--json").stdout)


def test_what_is_seen_in_a_pipeline(model, pipe):
    seen = inspect("--model", model)
    assert seen["family"] == "dit"
    assert seen["class"] == "DiTTransformer2DModel"
    assert seen["blocks"] == 6
    assert seen["dtype"] == "float32"
    assert seen["parameters"] == sum(p.numel() for p in pipe.transformer.parameters())
    block = pipe.transformer.transformer_blocks[0]
    assert seen["block_parameters"] == sum(p.numel() for p in block.parameters())
    assert seen["timestep_frequencies"] == "diffusers"
    assert seen["norm_eps"] == 1e-5
    assert seen["embedders_equal"] is False
    assert "linear" in seen["noise_axis"]
    assert len(seen["gmacs_by_depth"]) == 6
    assert "schedule" not in seen


def test_what_a_schedule_saves_on_it(model, tuned):
    seen = inspect("--model", model, "--schedule", "uniform:3")
    costs = seen["gmacs_by_depth"]
    assert seen["mean_depth"] == 3
    assert seen["mac_saving"] == f"{1 - costs[2] / costs[5]:.2%}"
    assert seen["mean_parameters_read"] == seen["parameters"] - 3 * seen["block_parameters"]
    in_force = inspect("--model", tuned)
    mean = 0.3 * costs[5] + 0.3 * costs[3] + 0.4 * costs[1]
    assert in_force["mac_saving"] == f"{1 - mean / costs[5]:.2%}"
    assert in_force["schedule"].count(SCHEDULE) == 1


def test_an_original_file(original):
    seen = inspect("--model", original, "--num-heads", "2")
    assert seen["timestep_frequencies"] == "original"
    assert seen["norm_eps"] == 1e-6
    assert seen["embedders_equal"] is True


def test_the_table(model):
    shown = cli("inspect", "--model", model, "--schedule", "uniform:3").stdout
    for word in ("DiTTransformer2DModel", "timestep frequencies", "GMACs per call", "mac saving"):
        assert word in shown
    assert "gmacs_by_depth" not in shown
