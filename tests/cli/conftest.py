"""The command line as from the shell, on a tiny model and six images."""

import sys

import huggingface_hub.constants
import pytest
from diffusers.utils import logging
from PIL import Image

from accelkit import cli

PROGRESS = (
    "encoding images ",
    "skipped ",
    "training ",
    "comparing ",
    "sampling ",
    "no feature extractor ",
)


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
def without_comparison(monkeypatch):
    """Ends a fine-tuning once its weights are saved; the comparison takes most of the time."""
    monkeypatch.setattr("accelkit.jobs.finetune.compare", lambda *args, **more: {"rows": []})
    monkeypatch.setattr("accelkit.cli.training.print_results", lambda *args: None)


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
