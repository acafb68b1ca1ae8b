"""The command line itself: help, tables, JSON, exit statuses."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from typer.main import get_command
from typer.testing import CliRunner

import accelkit
from accelkit import cli
from accelkit.bench.protocol import listed
from accelkit.cli import app
from accelkit.errors import AccelkitError, Stopped

COMMANDS = {
    *("finetune", "train", "sample", "bench", "report", "reproduce"),
    *("schedules", "convert", "inspect"),
}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs ``main`` as the shell does; returns exit status, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["accelkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


def child(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_needs_no_model_imports_no_torch():
    code = """
import io, sys
from contextlib import redirect_stdout
from accelkit.cli import main
for line in ("--help", "finetune --help", "--version", "schedules", "schedules D4 --json",
             "sample --dry-run", "bench --dry-run --json"):
    sys.argv = ["accelkit", *line.split()]
    shown = io.StringIO()
    with redirect_stdout(shown):
        try:
            main()
        except SystemExit as end:
            assert not end.code, line
    assert len(shown.getvalue()) > 10, line
    heavy = {"torch", "diffusers", "transformers", "accelerate", "matplotlib"} & set(sys.modules)
    print(line, "|", *sorted(heavy))
"""
    for line in child(code).splitlines():
        assert line.endswith("|"), line


def test_help_names_every_command_and_each_has_examples():
    shown = run("--help").stdout
    assert set(get_command(app).commands) == COMMANDS
    for name in COMMANDS:
        assert re.search(rf"^│ {name} ", shown, re.MULTILINE), name
        text = run(name, "--help").stdout
        assert "Example" in text
        assert f"accelkit {name} " in text
    assert run("finetune", "-h").stdout == run("finetune", "--help").stdout


def test_without_arguments_help_is_shown(main):
    status, out, err = main()
    assert status in (0, 2)
    assert "accelkit finetune --schedule D4" in out + err


def test_version():
    assert run("--version").stdout == f"accelkit {accelkit.__version__}\n"


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "accelkit", "schedules", "D4"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "mean depth 20.00 of 28" in done.stdout


def test_the_table_of_presets():
    shown = run("schedules").stdout
    for name, depths, saving in (
        ("D1", "28 26 24 22 20", "14.29%"),  # 1 - 24 / 28
        ("D3", "28 25 22 19 16", "21.43%"),
        ("D4", "28 24 20 16 12", "28.57%"),
        ("D6", "28 24 22 20 18", "37.14%"),  # 1 - 17.6 / 28; the rest is on the next line
    ):
        row = next(line for line in shown.splitlines() if f"│ {name} " in line)
        assert depths in row
        assert saving in row


def test_one_schedule():
    shown = run("schedules", "10@0.5,5@1", "--depth", "12").stdout
    assert re.search(r"0 – 0\.5 +│ +10 │", shown)
    assert "mean depth 7.50 of 12, ideal saving 37.50%" in shown
    scaled = run("schedules", "D4", "--depth", "14").stdout
    assert "mean depth 10.00 of 14" in scaled


def test_schedules_as_json():
    rows = json.loads(run("schedules", "--json").stdout)
    assert [r["name"] for r in rows] == ["D1", "D3", "D4", "D6", "dvd-2p", "dvd-3p", "dvd-4p"]
    one = json.loads(run("schedules", "D4", "--json").stdout)
    assert one == rows[2]
    assert one["mean_depth"] == pytest.approx(20)
    parsed = {k: one[k] for k in ("name", "layers", "intervals")}
    assert accelkit.Schedule.from_dict(parsed) == accelkit.Schedule.parse("D4")


def test_the_cost_under_a_sampler():
    shown = json.loads(
        run("schedules", "D4", "--sampler", "ddim", "--steps", "20", "--json").stdout
    )
    sampler = DDIMScheduler()
    sampler.set_timesteps(20)
    depths = [(28, 24, 20, 16, 12)[int(t) // 200] for t in sampler.timesteps]
    assert shown["mean_depth"] == pytest.approx(sum(depths) / 20)
    text = run("schedules", "D4", "--sampler", "ddim", "--steps", "20").stdout
    assert f"ddim, 20 steps: mean depth {sum(depths) / 20:.2f}" in text


def test_json_is_alone_on_standard_output(main, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m")
    _, out, _ = main("inspect", "--model", tmp_path / "m", "--json")
    assert json.loads(out)["blocks"] == 6
    _, out, err = main(
        *("sample", "--model", tmp_path / "m", "-o", tmp_path / "s", "-n", "2", "--steps", "2"),
        "--json",
    )
    assert len(json.loads(out)["files"]) == 2
    assert "sampling 2/2" in err


def test_settings_of_a_dry_run():
    sample = json.loads(run("sample", "--dry-run", "--json", "-n", "3", "--seed", "9").stdout)
    assert sample["number"] == 3
    assert sample["seed"] == 9
    assert not {"dry_run", "json", "recipe"} & sample.keys()
    Path("r.toml").write_text("[model]\nlayers = 3\n[autoencoder]\nsteps = 1\n[run]\nsteps=2")
    merged = run("finetune", "--baseline", "tome:0.3", "--dry-run", "--json")  # or --baselines
    assert json.loads(merged.stdout)["baselines"] == "tome:0.3"
    train = json.loads(run("train", "--recipe", "r.toml", "--dry-run", "--json").stdout)
    assert train["model"] == {"layers": 3}
    assert train["autoencoder"] == {"steps": 1}
    assert train["steps"] == 2
    assert [p.name for p in Path().iterdir()] == ["r.toml"]


def test_errors_are_one_line_and_the_traceback_is_for_debugging(main):
    status, out, err = main("schedules", "D9")
    assert (status, out) == (2, "")
    assert err.startswith("accelkit: unknown schedule 'D9'")
    assert err.count("\n") == 1
    status, out, err = main("--debug", "schedules", "D9")
    assert status == 2
    assert "Traceback" in err
    assert "accelkit.errors.AccelkitError: unknown schedule 'D9'" in err
    status, out, err = main("schedules", "D9")  # debugging does not stay on
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_signals_status(main, monkeypatch, number):
    def job(*args):
        raise Stopped(number, 12)

    monkeypatch.setattr("accelkit.jobs.finetune.finetune", job)
    status, _, err = main("finetune")
    assert status == 128 + number
    assert err == (
        f"accelkit: stopped by {number.name} after step 12; go on with --resume latest\n"
    )


@pytest.mark.parametrize(
    ("raised", "status"),
    [(AccelkitError("a\n  b"), 2), (TypeError("a b"), 2), (FileNotFoundError(2, "a b"), 2)],
)
def test_what_a_job_raises_is_one_line(main, monkeypatch, raised, status):
    def job(*args):
        raise raised

    monkeypatch.setattr("accelkit.jobs.inspect.inspect", job)
    found, out, err = main("inspect")
    assert (found, out) == (status, "")
    assert re.fullmatch(r"accelkit: .*a b.*\n", err)


def test_one_process_may_run_many_commands(main, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m")
    threads = torch.get_num_threads()
    for _ in range(2):
        assert main("inspect", "--model", tmp_path / "m")[0] == 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("D1,D4", ["D1", "D4"]),
        ("D4+tome:0.3:R3, D6", ["D4+tome:0.3:R3", "D6"]),
        ("dvd-2p:threshold=0.6,depth=2", ["dvd-2p:threshold=0.6,depth=2"]),
        ("uniform:3,dvd-2p:threshold=0.6,depth=2,D6", None),
        ("28@0.5,14@1;D4", ["28@0.5,14@1", "D4"]),
        ("dvd-2p:threshold=0.6,depth=2;D4", ["dvd-2p:threshold=0.6,depth=2", "D4"]),
    ],
)
def test_schedules_are_told_apart_by_commas_that_are_not_their_own(text, parts):
    assert listed(text) == (parts or ["uniform:3", "dvd-2p:threshold=0.6,depth=2", "D6"])


def test_a_recipe_spells_options_as_the_command_line_does(tmp_path):
    (tmp_path / "r.toml").write_text('schedule = "D6"\ndry-run = true\njson = true\n')
    done = run("finetune", "--recipe", str(tmp_path / "r.toml"))
    assert json.loads(done.stdout)["schedule"] == "D6"


def test_a_directory_tuned_from_the_builtin_has_its_settings(tmp_path):
    (tmp_path / "accelkit.json").write_text('{"base_model_name_or_path": "builtin"}')
    found, own = (
        json.loads(run("finetune", "--model", model, "--dry-run", "--json").stdout)
        for model in (str(tmp_path), "builtin")
    )
    assert {k: v for k, v in found.items() if k != "model"} == {
        k: v for k, v in own.items() if k != "model"
    }
