"""The comparison at the end of ``accelkit finetune``, also of a resumed run."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from accelkit.bench.results import read_results
from accelkit.cli import app
from accelkit.errors import AccelkitError
from accelkit.train.step import Step

SMALL = ["--sampling-steps", "2", "--eval-images", "2", "--eval-batch-size", "2"]


@pytest.fixture
def data(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    return tmp_path / "data"


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def compared(run):
    return [(row["method"], row["weights"]) for row in read_results(run)["rows"]]


def test_alternatives_run_on_the_untuned_weights(model, data, tmp_path):
    run, tuned = tmp_path / "run", "6@0.5,3+tome:0.25@1"
    command = [
        *("finetune", "--model", model, "--data", data, "--schedule", tuned),
        *("--steps", "1", "--batch-size", "2", *SMALL, "-o", run),
    ]
    cli(*command, "--baselines", "tome:0.5:R2,pab")
    others = [("tome:0.5:R2", "original"), ("pab", "original")]
    rows = [("full", "original"), (tuned, "original"), *others, (tuned, "tuned")]
    assert compared(run) == rows
    resume = ("finetune", "-o", run, "--resume", "latest")
    cli(*resume)
    assert compared(run) == rows
    cli(*resume, "--baselines", "tome:0.75")
    assert compared(run) == [*rows[:2], ("tome:0.75", "original"), rows[-1]]


def test_a_schedule_that_merges_can_be_resumed_by_its_name(model, data, tmp_path):
    run = tmp_path / "run"
    command = ["finetune", "--model", model, "--data", data, "--schedule", "D4+tome:0.25"]
    cli(*command, "--steps", "1", "--batch-size", "2", *SMALL, "-o", run)
    cli("finetune", "-o", run, "--resume", "latest")
    assert compared(run)[-1] == ("D4+tome:0.25", "tuned")


@pytest.mark.parametrize(
    ("baseline", "complaint"),
    [
        ("tomato", "unknown method 'tomato'"),
        ("tome:0.9", "at most 0.75"),
        ("tome:0.3:B3", "even number"),
        ("first_block_cache:many", "threshold of FirstBlockCache is a number from 0 on"),
        ("steps:0", "cannot read 'steps:0'"),
    ],
)
def test_what_is_no_alternative_is_refused_before_anything_is_trained(
    baseline, complaint, model, data, tmp_path, monkeypatch
):
    def trained(*args, **kwargs):
        raise AssertionError("trained")

    monkeypatch.setattr(Step, "gradients", trained)
    with pytest.raises(AccelkitError, match=complaint):
        cli(
            *("finetune", "--model", model, "--data", data, "-o", tmp_path / "run"),
            *("--schedule", "uniform:3", "--baselines", baseline),
        )
    assert not (tmp_path / "run").exists()
