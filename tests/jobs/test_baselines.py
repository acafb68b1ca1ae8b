"""``--baseline``: token merging at full depth in the comparisons of ``bench`` and ``finetune``."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from accelkit.bench import compare
from accelkit.cli import app
from accelkit.errors import AccelkitError
from accelkit.switch import enabled_on
from accelkit.train import loop

SMALL = ["--sampling-steps", "2", "--eval-images", "2", "--eval-batch-size", "2"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    return tmp_path / "data"


@pytest.fixture
def ran(monkeypatch):
    """The schedules under which images were made for the comparison, in order."""
    seen, generate = [], compare.generate

    def spied(pipe, *args):
        state = enabled_on(pipe)
        seen.append(str(state.schedule) if state else "none")
        return generate(pipe, *args)

    monkeypatch.setattr(compare, "generate", spied)
    return seen


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_bench_runs_baselines_at_full_depth_beside_its_schedules(model, data, tmp_path, ran):
    done = cli(
        *("bench", "--model", model, "--data", data, "-o", tmp_path / "run", "--json"),
        *("-n", "2", "--batch-size", "2", "--steps", "2"),
        *("--schedules", "uniform:3,uniform:3+tome:0.5", "--baseline", "tome:0.3:B4, tome:0.5"),
    )
    rows = json.loads(done.stdout)["rows"]
    assert [row["schedule"] for row in rows] == [
        "full",
        "uniform:3",
        "uniform:3+tome:0.5",
        "tome:0.3:B4",
        "tome:0.5",
    ]
    spelled = ["6@1", "3@1", "3+tome:0.5@1", "6+tome:0.3:B4@1", "6+tome:0.5@1"]
    assert [row["spelled"] for row in rows] == spelled
    assert ran == spelled * 2  # the first time to warm up
    assert [row["mean_depth"] for row in rows] == [6, 3, 3, 6, 6]
    assert [row["saving"] is None for row in rows] == [False] * 5
    assert rows[0]["saving"] == 0  # what the others are measured against
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["rows"] == rows
    assert results["protocol"]["evaluation"]["baselines"] == [
        {"ratio": 0.3, "placement": "B", "blocks": 4},
        {"ratio": 0.5, "placement": "all", "blocks": 0},
    ]


def test_finetune_measures_baselines_on_the_untuned_weights(model, data, tmp_path, ran):
    command = [
        *("finetune", "--model", model, "--data", data, "--schedule", "6@0.5,3+tome:0.25@1"),
        *("--steps", "1", "--batch-size", "2", *SMALL, "-o", tmp_path / "run"),
    ]
    cli(*command, "--baseline", "tome:0.5:R2")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    tuned = "6@0.5,3+tome:0.25@1"
    assert [(row["schedule"], row["tuned"]) for row in rows] == [
        ("full", False),
        (tuned, False),
        ("tome:0.5:R2", False),
        (tuned, True),
    ]
    assert ran[:4] == ["6@1", tuned, "6+tome:0.5:R2@1", tuned]

    resume = ("finetune", "-o", tmp_path / "run", "--resume", "latest")
    cli(*resume)
    again = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["schedule"] for row in again] == [row["schedule"] for row in rows]
    cli(*resume, "--baseline", "tome:0.75")
    again = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["schedule"] for row in again] == ["full", tuned, "tome:0.75", tuned]


def test_a_schedule_that_merges_can_be_resumed_by_its_name(model, data, tmp_path):
    run = tmp_path / "run"
    command = ["finetune", "--model", model, "--data", data, "--schedule", "D4+tome:0.25"]
    cli(*command, "--steps", "1", "--batch-size", "2", *SMALL, "-o", run)
    cli("finetune", "-o", run, "--resume", "latest")
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert rows[-1]["tuned"]


@pytest.mark.parametrize("command", ["bench", "finetune"])
@pytest.mark.parametrize(
    ("baseline", "complaint"),
    [
        ("D4", "--baseline takes token merging such as tome:0.3.*got 'D4'"),
        ("0.3", "--baseline takes token merging"),
        ("tome:0.9", "at most 0.75"),
        ("tome:0.3:B3", "even number"),
        ("tome:0.3;tome:0.5", "cannot read the token merging"),
    ],
)
def test_what_is_no_baseline_is_refused_at_once(command, baseline, complaint):
    with pytest.raises(AccelkitError, match=complaint):
        cli(command, "--baseline", baseline, "--dry-run")


@pytest.mark.parametrize("command", ["bench", "finetune"])
def test_what_the_model_cannot_run_is_refused_before_it_trains(
    command, model, data, tmp_path, monkeypatch, ran
):
    def trained(*args, **kwargs):
        raise AssertionError("trained")

    monkeypatch.setattr(loop._Step, "backward", trained)
    with pytest.raises(AccelkitError, match=r"merges tokens in 8 blocks.*has 6"):
        cli(
            *(command, "--model", model, "--data", data, "-o", tmp_path / "run"),
            *("--baseline", "tome:0.3:F8"),
        )
    assert not ran
    assert not (tmp_path / "run").exists()
