"""``accelkit finetune`` from the command line to its files, on a tiny pipeline."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import accelkit
from accelkit.artifact.names import named
from accelkit.bench.results import read_results
from accelkit.cli import app
from accelkit.errors import AccelkitError
from accelkit.train.rundir import RunDirectory
from accelkit.train.step import Step

SCHEDULE = "6@0.5,3@1"
SMALL = ["--eval-images", "4", "--eval-batch-size", "2", "--sampling-steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for name in ("ant", "bee"):
        (folder / name).mkdir()
        for i in range(4):
            pixels = draw.integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def command(model, data):
    """The arguments of a run of four steps, a checkpoint after every second one."""
    return [
        *("finetune", "--model", str(model), "--data", str(data), "--schedule", SCHEDULE),
        *("--steps", "4", "--batch-size", "4", "--learning-rate", "1e-3", "--ema-decay", "0.5"),
        *("--checkpoint-every", "2", *SMALL),
    ]


@pytest.fixture(scope="module")
def ran(command, tmp_path_factory):
    """A finished run and what it printed; tests that write to the run copy it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    return run, cli(*command, "--preview-every", "4", "-o", run, "--json").stdout


@pytest.fixture
def run(ran, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(ran[0], tmp_path / "run")


def cli(*arguments):
    """Run a command in this process; its errors come through."""
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def weights(folder):
    return load_file(folder / "accelkit.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def content(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_it_leaves_artifact_results_and_pictures(ran, model, data):
    run, printed = ran
    results = json.loads((run / "results.json").read_text())
    assert json.loads(printed) == {"output": str(run), "rows": results["rows"]}

    protocol = read_results(run)["protocol"]
    assert protocol["model"]["name"] == str(model)
    assert protocol["training"]["steps"] == 4
    assert protocol["data"]["n"] == 8
    assert protocol["images"] == 4
    assert protocol["samplers"] == ["ddim:2"]
    assert protocol["machine"]["packages"]["torch"] == torch.__version__
    rows = results["rows"]
    methods = [(row["method"], row["weights"]) for row in rows]
    assert methods == [("full", "original"), (SCHEDULE, "original"), (SCHEDULE, "tuned")]
    assert [row["fid"] for row in rows] == [None] * 3  # no features for these images
    assert rows[0]["saving"] == 0
    assert rows[0]["ideal_saving"] == 0
    # DDIM in two steps visits 500 and 0: three blocks (the interval is half open) and six
    assert rows[1]["ideal_saving"] == pytest.approx(1 / 4)

    assert accelkit.Schedule.from_dict(named(run).config["schedule"]).name == SCHEDULE
    config = json.loads((run / "accelkit.json").read_text())
    assert config["metrics"]["rows"] == rows
    assert config["training"]["data"] == str(data)
    before = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not same(weights(run), before)
    frozen = [k for k in before if "timestep_embedder" in k]
    assert frozen
    assert all(torch.equal(weights(run)[k], before[k]) for k in frozen)

    pictures = {row["file"]: (10 * 10 + 2, 10 + 2) for row in results["samples"]}
    assert len(pictures) == 3
    pictures["previews/step-00000004.png"] = (4 * 10 + 2, 4 * 10 + 2)
    pictures["plots/pareto.png"] = None
    for name, size in pictures.items():
        with Image.open(run / name) as image:
            image.load()
            assert size is None or image.size == size
    assert RunDirectory(run).latest()[0] == 4
    assert not list(run.rglob("*partial*"))


def test_resuming_a_finished_run_only_measures_again(run, monkeypatch):
    first = weights(run)
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert len(rows) == 3

    def trained(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(Step, "gradients", trained)
    cli("finetune", "-o", run, "--resume", "latest", "--eval-images", "6")
    assert read_results(run)["protocol"]["images"] == 6
    assert same(weights(run), first)


def test_a_killed_run_ends_with_the_same_weights(command, tmp_path):
    long = [*command, "--steps", "1000", "-o", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-m", "accelkit", *long],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("killed/checkpoints/step-*")):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
        process.stderr.close()
    stopped = RunDirectory(tmp_path / "killed").latest()[0]
    assert stopped < 1000
    # The run is shortened by its stored settings, so that the test takes no longer than needed.
    settings = tmp_path / "killed" / "run.json"
    stored = json.loads(settings.read_text())
    stored["train"]["steps"] = stopped + 3
    del stored["sha256"]
    settings.write_text(json.dumps(stored))
    cli("finetune", "-o", tmp_path / "killed", "--resume", "latest")
    cli(*command, "--steps", stopped + 3, "-o", tmp_path / "whole")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_what_is_there_is_not_overwritten(command, run):
    before = content(run)
    with pytest.raises(AccelkitError, match="not empty"):
        cli(*command, "-o", run)
    with pytest.raises(AccelkitError, match="other settings"):
        cli(*command, "-o", run, "--resume", "latest", "--learning-rate", "1e-4")
    assert content(run) == before
    cli(*command, "-o", run, "--overwrite", "--learning-rate", "1e-4")
    assert not same(weights(run), load_file_bytes(before["accelkit.safetensors"]))


def load_file_bytes(data):
    from safetensors.torch import load

    return load(data)


def test_two_runs_in_one_directory(command, run):
    other = RunDirectory(run)
    other.open(other.stored(), resume=True, overwrite=False, free=frozenset())
    before = content(run)
    for way in (["--overwrite"], ["--resume", "latest"]):
        with pytest.raises(AccelkitError, match="another run is at work"):
            cli(*command, "-o", run, *way)
    assert content(run) == before
    other.close()
    cli(*command, "-o", run, "--resume", "latest")


def settings(*arguments):
    done = cli("finetune", *arguments, "--dry-run", "--json")
    return json.loads(done.stdout)


def test_a_dry_run_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = settings("--schedule", "D3", "--model", "me/model", "--data", "nowhere")
    assert shown["model"] == "me/model"
    assert shown["output"] == "runs/finetune-D3"
    assert shown["steps"] == 10_000
    assert list(tmp_path.iterdir()) == []
    table = cli("finetune", "--dry-run").stdout
    assert "runs/finetune-D4" in table


def test_flag_before_recipe_before_what_suits_the_built_in_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(
        'schedule = "D3"\nsteps = 7\nlearning-rate = 0.25\n[group]\nflip = true\nsampler = "dpm"\n'
    )
    shown = settings("--recipe", "mine.toml", "--steps", "5")
    assert shown["steps"] == 5  # the flag
    assert shown["schedule"] == "D3"  # the recipe, a table of which only groups
    assert shown["learning_rate"] == 0.25
    assert shown["flip"] is True
    assert shown["sampler"] == "dpm"
    assert shown["batch_size"] == 128  # what suits the built-in model
    assert shown["weight_decay"] == 0  # the default
    other = settings("--recipe", "mine.toml", "--model", "me/model", "--data", "mine")
    assert other["batch_size"] == 64
    assert settings("--steps", "10000")["steps"] == 10_000  # a flag that says the default


def test_an_unknown_setting_names_the_nearest(tmp_path):
    (tmp_path / "r.toml").write_text("learning_rat = 1\n")
    with pytest.raises(AccelkitError, match=r"unknown setting 'learning_rat'.*'learning_rate'"):
        settings("--recipe", tmp_path / "r.toml")


def test_images_without_classes_mirrored_and_skipped(command, data, tmp_path):
    (tmp_path / "flat").mkdir()
    for path in data.rglob("*.png"):
        shutil.copy(path, tmp_path / "flat" / f"{path.parent.name}-{path.name}")
    (tmp_path / "flat" / "ant-0.png").write_bytes(b"broken")
    flat = [*command, "--data", str(tmp_path / "flat"), "--steps", "2"]
    with pytest.raises(AccelkitError, match=r"ant-0\.png"):
        cli(*flat, "-o", tmp_path / "strict")
    done = cli(*flat, "-o", tmp_path / "run", "--skip-bad", "--flip", "--preview-every", "2")
    assert "skipped 1 images" in done.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["protocol"]["classes"] == 1
    assert (tmp_path / "run" / "previews" / "step-00000002.png").is_file()


def test_an_artifact_is_fine_tuned_further_and_recorded(ran, command, model, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    again = [a if a != str(model) else str(ran[0]) for a in command]
    run = tmp_path / "second"
    cli(*again, "-o", run, "--schedule", "uniform:2", "--report-to", "tensorboard")
    config = named(run).config
    assert config["base_model_name_or_path"] == str(model)
    assert accelkit.Schedule.from_dict(config["schedule"]).depths == (2,)
    assert list(run.rglob("events.out.tfevents.*"))


def launch(*arguments):
    # what accelerate launch runs for several GPUs; for CPUs alone it wants MPI
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "accelkit", *map(str, arguments)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=170,
    )


def test_two_processes_make_what_one_makes(ran, command, tmp_path):
    done = launch(*command, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = weights(ran[0]), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        if "to_k.bias" in key:
            continue  # the softmax ignores it: its gradient is rounding, which Adam blows up
        torch.testing.assert_close(two[key], value, atol=2e-5, rtol=1e-4, msg=key)
    step = RunDirectory(tmp_path / "two").latest()[1]
    assert len(list(step.glob("random_states_*.pkl"))) == 2  # a process each
    assert done.stdout.count("results in") == 1
    assert len(json.loads((tmp_path / "two" / "results.json").read_text())["rows"]) == 3
