"""What can go wrong with a run: exit status 2, one line that says what to do, nothing lost."""

import errno
import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from spoil import Evil, content, cut_weights

import accelkit
from accelkit.train.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("without_comparison")

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


def test_a_corrected_command_can_have_the_directory(refused, main, finetune, data, tmp_path):
    (data / "bee" / "0.png").write_bytes(b"no image")
    assert "bee/0.png" in refused(*finetune)
    assert not (tmp_path / "cwd" / "run").exists()
    assert "cannot be shared" in refused(
        *finetune, "--skip-bad", "--gradient-accumulation", "3", after_progress=True
    )
    assert main(*finetune, "--skip-bad")[0] == 0


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
    again = ("finetune", "-o", "run", "--resume", "latest")
    pickles = [path for path in step.iterdir() if path.suffix in (".pt", ".bin", ".pkl")]
    assert len(pickles) == 3
    sums = (step / "checksums.json").read_bytes()
    for path in pickles:
        kept = path.read_bytes()
        torch.save(Evil(), path)
        assert f"{path.name} is damaged" in refused(*again)
        (step / "checksums.json").unlink()  # as of an earlier version
        assert "cannot read the checkpoint" in refused(*again)
        path.write_bytes(kept)
        (step / "checksums.json").write_bytes(sums)
    assert main(*again)[0] == 0
    assert not (tmp_path / "cwd" / "ran").exists()


def test_data_that_changed_under_the_same_name(refused, main, finetune, data, model, tmp_path):
    assert main(*finetune)[0] == 0
    before = content(tmp_path / "cwd" / "run" / "checkpoints")
    again = ("finetune", "-o", "run", "--resume", "latest")
    kept = (data / "bee" / "1.png").read_bytes()
    Image.effect_noise((8, 8), 99).save(data / "bee" / "1.png")
    message = refused(*again)
    assert message.startswith("the images changed since the run in run began; resume with what")
    assert message.endswith("start over with --overwrite")
    (data / "bee" / "1.png").rename(data / "ant" / "9.png")
    assert "the images and the labels changed" in refused(*again)
    (data / "ant" / "9.png").unlink()
    (data / "bee" / "1.png").write_bytes(kept)
    for part in ("transformer", "vae"):
        path = model / part / "diffusion_pytorch_model.safetensors"
        weights = path.read_bytes()
        changed = {k: v * 1.01 for k, v in load_file(path).items()}
        save_file(changed, path, {"format": "pt"})
        assert refused(*again).startswith("the model changed since the run in run began")
        path.write_bytes(weights)
    assert "train.steps: 4 then, 5 now" in refused(*again, "--steps", "5")
    assert "schedule.intervals" in refused(*again, "--schedule", "6@0.4,3@1")
    assert content(tmp_path / "cwd" / "run" / "checkpoints") == before
    assert main(*again)[0] == 0


# --- training that goes wrong


def poisoned(model, value, name="proj_out_2.weight"):
    pipe = DiTPipeline.from_pretrained(model)
    with torch.no_grad():
        pipe.transformer.get_parameter(name)[0, 0] = value
    pipe.save_pretrained(model)


def test_a_poisoned_model(refused, finetune, model, data):
    poisoned(model, float("nan"))
    bench = ("bench", "--model", model, "--data", data, "-o", "other")
    for command in (finetune, ("sample", "--model", model, "-o", "other"), bench):
        message = refused(*command)
        assert f"proj_out_2.weight in the transformer of {model} holds NaN" in message


def test_a_model_that_overflows(refused, finetune, model):
    """The weights are finite, but the outputs are not."""
    poisoned(model, 1e38)
    message = refused(*finetune, after_progress=True)
    assert re.search(r"the loss is (nan|inf) at step 1; no checkpoint was written", message)
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


def test_files_that_may_not_grow(refused, main, finetune):
    # A limit of the process is as real as a full disk, and as sudden.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (300, 20_000, 700_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            message = refused(*finetune, "--overwrite", after_progress=True)
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


# --- in a process of its own


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
