"""What a user can get wrong: exit status 2, one line that says what to do, nothing lost."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile

import huggingface_hub.constants
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel
from diffusers.utils import logging
from PIL import Image
from safetensors.torch import load_file

import accelkit
from accelkit import cli
from accelkit.train.rundir import RunDirectory

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROGRESS = ("encoding images ", "training ", "comparing ", "sampling ", "no feature extractor ")


@pytest.fixture(autouse=True)
def as_from_the_shell(tmp_path, monkeypatch):
    """The working directory and cache are empty, the libraries as quiet as ``main`` makes them."""
    monkeypatch.setenv("ACCELKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.effect_noise((8, 8), 50 + i).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def finetune(model, data):
    """Arguments of a short run."""
    return [
        *("finetune", "--model", str(model), "--data", str(data), "--schedule", "6@0.5,3@1"),
        *("--steps", "4", "--batch-size", "4", "--checkpoint-every", "1"),
        *("--eval-images", "2", "--eval-batch-size", "2", "--sampling-steps", "2", "-o", "run"),
    ]


@pytest.fixture
def main(monkeypatch, capfd, recwarn):
    """Runs the command line; returns exit status, output and lines of errors."""

    def call(*arguments):
        capfd.readouterr()
        recwarn.clear()
        monkeypatch.setattr(sys, "argv", ["accelkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        shown = [w for w in recwarn if not issubclass(w.category, DeprecationWarning)]
        return ended.value.code or 0, out, err.splitlines() + [str(w.message) for w in shown]

    return call


@pytest.fixture
def refused(main):
    """Runs what must be refused; returns the line, without the command's name."""

    def call(*arguments, after_progress=False):
        status, out, lines = main(*arguments)
        if after_progress:
            lines = [line for line in lines if not line.startswith(PROGRESS)]
        assert len(lines) == 1, lines
        assert lines[0].startswith("accelkit: ")
        assert (status, out) == (2, "")
        return lines[0].removeprefix("accelkit: ")

    return call


def content(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# --- schedules and settings: refused before anything is opened


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("D5", "unknown schedule 'D5'.*nearest first: D"),
        ("d44", "nearest first: D4,"),
        ("ful", "nearest first: full,"),
        ("28@0.5,14@0.4,3@1", "edges of a schedule must rise.*0.5, 0.4, 1"),
        ("28@0.5,14@0.9", "last edge of a schedule must be 1.*0.9"),
        ("28@0.5,0@1", "depth 0 runs no block"),
        ("28@0.5,-3@1", "depth -3 runs no block"),
        ("28@0.5,14@", "cannot read the schedule"),
        ("28@nan,14@1", "cannot read the schedule"),
        ("uniform:0", "depth 0"),
        ("nowhere.toml", "no schedule file at nowhere.toml"),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "bench", "sample", "schedules"])
def test_schedules(refused, command, schedule, words, tmp_path):
    option = {"finetune": "--schedule", "bench": "--schedules", "sample": "--schedule"}
    given = [command, *([option[command]] if command in option else []), schedule]
    if command == "bench" and "," in schedule:
        given[-1] = schedule + ";full"
    assert re.search(words, refused(*given))
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_schedule_deeper_than_the_model(refused, finetune, tmp_path):
    finetune[finetune.index("6@0.5,3@1")] = "7@0.5,3@1"
    message = refused(*finetune)
    assert "depth 7 is above the model's 6 blocks" in message
    assert list((tmp_path / "cwd").iterdir()) == []
    assert "above the model's 28" in refused("schedules", "uniform:29")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read the schedule file"),
        ("[]", "a schedule is a table"),
        ('{"layers": 6, "intervals": [{"until": 1}]}', "each interval"),
        ('{"layers": 6, "intervals": [{"until": 1, "depth": "x"}]}', "depth"),
        ('{"layers": 6, "intervals": [{"until": 1, "depth": 3, "scale": 2}]}', "each interval"),
        ('{"layers": "6", "intervals": [{"until": 1, "depth": 3}]}', "layers"),
    ],
)
def test_schedule_files(refused, content, words, tmp_path):
    (tmp_path / "s.json").write_text(content)
    assert words in refused("schedules", tmp_path / "s.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--sampler", "euler"], "unknown sampler 'euler'; known: ddpm, ddim, dpm"),
        (["sample", "--steps", "0"], "give 1 to 1000"),
        (["sample", "--steps", "1001"], "give 1 to 1000"),
        (["sample", "-n", "0"], "at least 1 image"),
        (["sample", "--batch-size", "0"], "batch of 1"),
        (["sample", "--labels", "one"], "cannot read the labels 'one'"),
        (["sample", "--labels", "1001"], "classes 0 to 999, got 1001"),
        (["bench", "--sampler", "euler"], "unknown sampler 'euler'"),
        (["bench", "-n", "0"], "at least 1 image"),
        (["schedules", "D4", "--sampler", "euler"], "unknown sampler 'euler'"),
        (["schedules", "--family", "uvit"], "uvit"),
        (["schedules", "--depth", "0"], "at least 1"),
        (["finetune", "--schedule", ""], "unknown schedule ''"),
        (["finetune", "--lr-schedule", "linear"], "lr_schedule must be one of constant, cosine"),
        (["finetune", "--loss-weight", "x"], "loss_weight must be one of ones, ramp"),
        (["finetune", "--mixed-precision", "fp8"], "mixed_precision must be one of no, bf16, fp16"),
        (["finetune", "--steps", "0"], "steps must be at least 1"),
        (["finetune", "--learning-rate", "nan"], "learning_rate must be above 0"),
        (["finetune", "--learning-rate", "-1"], "learning_rate must be above 0"),
        (["finetune", "--ema-decay", "1"], "ema_decay must be in"),
        (["finetune", "--label-dropout", "1.5"], "label_dropout must be in"),
        (["finetune", "--resume", "step-3"], "--resume takes 'latest', got 'step-3'"),
        (["finetune", "--resume", "latest", "-o", "gone"], "no run in gone to resume"),
        (["train", "--resume", "best"], "--resume takes 'latest', got 'best'"),
        (["finetune", "--sampler", "euler", "-o", "run"], "unknown sampler 'euler'"),
        (["finetune", "--sampling-steps", "0", "-o", "run"], "give 1 to 1000"),
        (["finetune", "--eval-images", "0", "-o", "run"], "at least 1 image"),
        (["finetune", "--report-to", "abacus", "-o", "run"], "--report-to abacus"),
        (["finetune", "--data", "nowhere"], "no data at nowhere"),
        (["finetune", "--model", "nowhere"], "nowhere"),
        (["convert", "nowhere.pt", "x"], "nowhere.pt does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(refused, arguments, words, tmp_path):
    assert words in refused(*arguments)
    assert not (tmp_path / "cwd" / "run").exists()  # refused before a run begins


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", "--steps", "many"], "'--steps'"),
        (["finetune", "--stepz", "3"], "--stepz"),
        (["fine"], "fine"),
        (["convert"], "source"),
    ],
)
def test_what_the_parser_refuses(refused, arguments, words):
    assert words in refused(*arguments)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("steps = 'many'", "steps in the recipe"),
        ("steps = 3.5", "steps in the recipe"),
        ("steps = [3]", "steps takes one value, the recipe has [3]"),
        ("steps = true", "steps takes one value"),
        ("flip = 1", "flip takes true or false, the recipe has 1"),
        ("flip = 'yes'", "flip takes true or false"),
        ("learning_rate = 'fast'", "learning_rate in the recipe"),
        ("learning_rat = 1", "unknown setting 'learning_rat' in the recipe; did you mean"),
        ("[train]\nsteps = 0", "steps must be at least 1"),
        ("steps = ", "cannot read the recipe"),
        ("schedule = 'D5'", "unknown schedule 'D5'"),
    ],
)
def test_recipes(refused, recipe, words, tmp_path):
    (tmp_path / "r.toml").write_text(recipe)
    assert words in refused("finetune", "--recipe", tmp_path / "r.toml")
    assert "no recipe at" in refused("finetune", "--recipe", tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("[model]\nlayer = 3", "unknown settings in [model]: layer"),
        ("[model]\nimage_size = 30", "image_size 30"),
        ("[model]\nlayers = 'three'", "number of blocks, at least 1, not 'three'"),
        ("[model]\nnum_classes = 9", "num_classes"),
        ("[autoencoder]\nstep = 3", "unknown settings in [autoencoder]: step"),
        ("model = 3", "[model] is a table of settings, the recipe has 3"),
    ],
)
def test_recipes_for_training(refused, recipe, words, tmp_path):
    quick = "" if "autoencoder" in recipe else "\n[autoencoder]\nsteps = 1\nchannels = [8, 8, 8]\n"
    (tmp_path / "r.toml").write_text(recipe + quick)
    given = ("train", "--recipe", tmp_path / "r.toml", "-o", "run")
    assert words in refused(*given, after_progress=True)


# --- models


def spoil_json(model):
    (model / "model_index.json").write_text("{")


def cut_weights(model):
    path = model / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-5000])


def unet(model):
    shutil.rmtree(model)
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(model)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def pickled(model):
    (model / "transformer" / WEIGHTS).unlink()
    torch.save(Evil(), model / "transformer" / "diffusion_pytorch_model.bin")


MODELS = {
    "missing": (shutil.rmtree, "no model at"),
    "empty": (lambda m: (shutil.rmtree(m), m.mkdir()), "no model_index.json"),
    "another network": (unet, "no backbone for UNet2DModel"),
    "truncated": (cut_weights, "cannot read the model"),
    "corrupt JSON": (spoil_json, "cannot read"),
    "pickled code": (pickled, "cannot read the model"),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["finetune", "sample", "bench", "inspect"])
def test_models(refused, model, command, case, tmp_path):
    spoil, words = MODELS[case]
    spoil(model)
    assert words in refused(command, "--model", model)
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize("command", ["finetune", "sample", "bench", "inspect", "convert"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: torch.save(Evil(), path), "could run code"),
        (lambda path: path.write_bytes(b"PK\x03\x04 cut"), "cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), "layout of no known family"),
        (lambda path: torch.save([1, 2], path), "holds a list"),
    ],
    ids=["code", "cut", "empty", "else", "list"],
)
def test_original_files(refused, command, make, words, tmp_path):
    make(tmp_path / "dit.pt")
    given = [tmp_path / "dit.pt", "x"] if command == "convert" else ["--model", tmp_path / "dit.pt"]
    assert words in refused(command, *given)
    assert list((tmp_path / "cwd").iterdir()) == []


# --- data


def test_data(refused, finetune, data, tmp_path):
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "cut.zip", "w") as archive:
        archive.write(data / "ant" / "0.png", "ant/0.png")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "cut.zip").read_bytes()[:-30])
    for name, words in (("empty", "no images in"), ("cut.zip", "cannot read the zip")):
        finetune[finetune.index("--data") + 1] = str(tmp_path / name)
        assert words in refused(*finetune)
        assert list((tmp_path / "cwd").iterdir()) == []
    shutil.copy(data / "ant" / "0.png", data / "loose.png")
    finetune[finetune.index("--data") + 1] = str(data)
    assert "beside class folders" in refused(*finetune)


def test_a_broken_image(refused, finetune, data):
    (data / "bee" / "1.png").write_bytes(b"broken")
    before = content(data)
    assert "bee/1.png" in refused(*finetune, after_progress=True)
    assert content(data) == before


def test_more_classes_than_the_model_has(refused, finetune, data, model, make_dit, tmp_path):
    pipe = DiTPipeline.from_pretrained(model)
    config = {**pipe.transformer.config, "num_embeds_ada_norm": 1}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config))
    pipe.save_pretrained(model)
    assert "has 2 classes, the model has 1;" in refused(*finetune)
    assert list((tmp_path / "cwd").iterdir()) == []


# --- output directories


def test_a_directory_with_something_in_it(refused, finetune, model):
    os.mkdir("run")
    with open("run/mine.txt", "w") as file:
        file.write("mine")
    assert "not empty" in refused(*finetune)
    assert "no accelkit run" in refused(*finetune, "--overwrite")
    assert "no run in run to resume" in refused(*finetune, "--resume", "latest")
    assert "not an empty directory" in refused("sample", "--model", model, "-o", "run")
    assert os.listdir("run") == ["mine.txt"]
    for command in (finetune[:-2], ["sample"], ["bench"]):
        message = refused(*command, "-o", "run/mine.txt", *(["--model", model][:0]))
        assert "run/mine.txt" in message
    with open("run/mine.txt") as file:
        assert file.read() == "mine"


def test_a_directory_that_another_run_is_using(refused, main, finetune, tmp_path):
    assert main(*finetune)[0] == 0
    run = RunDirectory("run")
    run.open(run.stored(), resume=True, overwrite=False, free=frozenset())
    before = content(tmp_path / "cwd")
    assert "another run is at work in run" in refused(*finetune, "--overwrite")
    assert content(tmp_path / "cwd") == before
    run.close()


def test_resuming_a_run_of_another_command(refused, tmp_path):
    os.mkdir("run")
    settings = {"job": "train", "source": {}, "train": {}, "schedule": {}}
    (tmp_path / "cwd" / "run" / "run.json").write_text(json.dumps(settings))
    assert "run" in refused("finetune", "-o", "run", "--resume", "latest")


@pytest.mark.parametrize("stored", ["{", "[]", "{}", '{"evaluation": 3}'])
def test_resuming_a_run_with_spoilt_settings(refused, stored, tmp_path):
    os.mkdir("run")
    (tmp_path / "cwd" / "run" / "run.json").write_text(stored)
    refused("finetune", "-o", "run", "--resume", "latest")
    assert (tmp_path / "cwd" / "run" / "run.json").read_text() == stored


def test_a_checkpoint_with_code_in_it(refused, main, finetune, tmp_path):
    assert main(*finetune)[0] == 0
    step = RunDirectory("run").latest()[1]
    pickles = [path for path in step.iterdir() if path.suffix != ".safetensors"]
    assert len(pickles) >= 2
    for path in pickles:
        kept = path.read_bytes()
        torch.save(Evil(), path)
        again = ("finetune", "-o", "run", "--resume", "latest")
        if path.name.startswith("random_states"):  # nothing is drawn from them
            assert main(*again)[0] == 0
        else:
            assert "cannot read the checkpoint" in refused(*again)
        path.write_bytes(kept)
    assert not (tmp_path / "cwd" / "ran").exists()


# --- training that goes wrong


def test_a_poisoned_model(refused, finetune, model):
    pipe = DiTPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.transformer.proj_out_2.weight[0, 0] = float("nan")
    pipe.save_pretrained(model)
    message = refused(*finetune, after_progress=True)
    assert "the loss is nan at step 1; no checkpoint was reached" in message
    assert "--learning-rate" in message


def test_divergence_keeps_the_checkpoint(refused, finetune):
    message = refused(*finetune, "--learning-rate", "1e30", after_progress=True)
    assert "the loss is" in message
    step, folder = RunDirectory("run").latest()
    assert f"the checkpoint of step {step} is kept" in message
    assert load_file(folder / "model.safetensors")


def test_a_full_disk_keeps_the_checkpoint(refused, main, finetune, monkeypatch):
    from accelerate import Accelerator

    save = Accelerator.save_state

    def fills_up(self, folder, **options):
        if folder.endswith("00000003"):
            with open(f"{folder}/model.safetensors", "wb") as file:
                file.write(b"the first bytes")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, folder, **options)

    monkeypatch.setattr(Accelerator, "save_state", fills_up)
    message = refused(*finetune, after_progress=True)
    assert "no room to write" in message
    assert "--resume latest" in message
    assert RunDirectory("run").latest()[0] == 2
    monkeypatch.setattr(Accelerator, "save_state", save)
    assert main("finetune", "-o", "run", "--resume", "latest")[0] == 0
    accelkit.from_pretrained("run")


@pytest.mark.parametrize("room", [300, 20_000, 700_000])
def test_files_that_may_not_grow(refused, main, finetune, room):
    # a limit of the process: as real as a full disk, and as sudden
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        message = refused(*finetune, after_progress=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "too large" in message.lower() or "no room" in message or "cannot write" in message
    assert RunDirectory("run").latest() is None
    assert main(*finetune, "--overwrite")[0] == 0


def test_a_read_only_place(refused, main, model, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    assert "Permission denied" in refused("sample", "--model", model, "--steps", "2")


# --- and once more as it is, in a process of its own


def test_from_the_shell(tmp_path, model):
    lines = [
        ["sample", "--model", str(model), "--sampler", "euler"],
        ["inspect", "--model", str(tmp_path / "gone")],
        ["finetune", "--model", str(model), "--schedule", "7@1"],
    ]
    cut_weights(model)
    lines.append(["inspect", "--model", str(model)])
    code = """
import json, sys
from accelkit.cli import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["accelkit", *line]
    try:
        main()
    except SystemExit as end:
        print(end.code, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["2"] * 4
    assert [line[:10] for line in done.stderr.splitlines()] == ["accelkit: "] * 4
