"""What is printed where a terminal cannot show everything, and what is printed of errors."""

import json
import os
import signal
import subprocess
import sys

import pytest
from spoil import WEIGHTS

from accelkit.cli import terminal
from accelkit.errors import LONGEST, AccelkitError
from accelkit.files.locks import LOCK, alone_in

# the C locale without Python's own turn to UTF-8, as under cron of old systems
NARROW = {
    "ascii": {"PYTHONIOENCODING": "ascii", "TERM": "dumb"},
    "strict ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
}
LINES = [
    ["--help"],
    ["finetune", "--help"],
    ["schedules"],
    ["schedules", "D4"],
    ["reproduce"],
    ["schedules", "Ünknown–\udcff\x1b[31m"],
    ["finetune", "--schedule", "x[/b]", "--model", "\udcff", "--data", "…", "--dry-run"],
    ["sample", "--model", "[/b]", "--dry-run"],
]
CODE = """
import json, sys
from accelkit.cli import main
for line in json.loads(sys.stdin.read()):
    sys.argv = ["accelkit", *line]
    try:
        main()
    except SystemExit as end:
        print("status", end.code or 0, flush=True)
"""


def child(lines, **env):
    return subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(lines),
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        env={**os.environ, **env},
        timeout=120,
    )


@pytest.mark.parametrize("narrow", NARROW)
def test_any_encoding_can_show_everything(narrow):
    done = child(LINES, **NARROW[narrow])
    found = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status")]
    assert found == [0, 0, 0, 0, 0, 2, 2, 0]
    assert "Traceback" not in done.stderr
    assert "UnicodeEncodeError" not in done.stderr
    assert all(line.startswith("accelkit: ") for line in done.stderr.splitlines())
    if narrow != "latin":
        assert (done.stdout + done.stderr).isascii()
        assert "| 0.2 - 0.4   |     24 | ########" in done.stdout


def test_brackets_are_shown_as_they_are(main):
    for name in ("[/b]", "[red]a", ":smile:"):
        status, out, errors = main("sample", "--model", name, "--dry-run")
        assert (status, errors) == (0, [])
        assert name in out


def test_a_full_disk_for_the_output():
    with open("/dev/full", "w") as full:
        code = "from accelkit.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "schedules"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr == "accelkit: OSError: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("a\nb"), RecursionError("deep"), ValueError("x" * 9999)]
)
def test_a_fault_of_accelkits_own_is_one_line_too(main, monkeypatch, error):
    def job(*args):
        raise error

    monkeypatch.setattr("accelkit.jobs.inspect.inspect", job)
    status, out, errors = main("inspect")
    assert (status, out) == (1, "")
    assert len(errors) == 1
    assert errors[0].startswith(f"accelkit: a fault of accelkit's own, {type(error).__name__}: ")
    assert errors[0].endswith("accelkit --debug")
    assert len(errors[0]) <= LONGEST
    _, _, errors = main("--debug", "inspect")
    assert errors[0] == "Traceback (most recent call last):"


def test_an_interruption_is_one_line(main, monkeypatch):
    def job(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("accelkit.jobs.inspect.inspect", job)
    assert main("inspect") == (130, "", ["accelkit: interrupted"])


def test_messages_are_cut_and_what_to_do_is_kept(refused):
    message = refused("schedules", "x y " * 25_000)
    assert message.startswith("unknown schedule 'x y ")
    assert message.endswith("or a .toml or .json file")
    assert len("accelkit: " + message) <= LONGEST


def test_warnings_are_cut_as_well(capsys):
    terminal.say("warning: " + "a b " * 1_000)
    assert len(capsys.readouterr().err) == LONGEST + 1


# --- paths that are no text


@pytest.fixture
def bytes_of_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"b\xff")
    folder.mkdir()
    return folder


def test_paths_that_are_no_utf8(main, refused, finetune, model, data, bytes_of_no_text):
    moved = data.rename(bytes_of_no_text / "data")
    status, out, _ = main("sample", "--model", model, "-o", bytes_of_no_text / "s", "--steps", "2")
    assert status == 0
    assert r"b\udcff" in out
    finetune[finetune.index("--data") + 1] = str(moved)
    assert main(*finetune)[0] == 0
    assert main("finetune", "-o", "run", "--resume", "latest")[0] == 0
    assert main("report", "run")[0] == 0
    for command in (["finetune"], ["train"], ["bench"]):
        assert "is not UTF-8" in refused(*command, "-o", bytes_of_no_text / "run")
    model = model.rename(bytes_of_no_text / "model")
    assert (model / "transformer" / WEIGHTS).exists()
    assert "its path is not UTF-8" in refused("inspect", "--model", model)


# --- one sampling at a time


def test_two_samplings_in_one_directory(main, refused, model, tmp_path):
    (tmp_path / "s").mkdir()
    command = ("sample", "--model", model, "--steps", "2", "-o", tmp_path / "s")
    with alone_in(tmp_path / "s", "another accelkit sample"):
        assert "another accelkit sample is at work in" in refused(*command)
        assert [p.name for p in (tmp_path / "s").iterdir()] == [LOCK]
    assert main(*command)[0] == 0
    assert not (tmp_path / "s" / LOCK).exists()


def test_the_lock_of_a_killed_sampling_is_nothing(main, tmp_path, model):
    (tmp_path / "s").mkdir()
    code = (
        "import sys, time; from pathlib import Path; from accelkit.files.locks import alone_in\n"
        "with alone_in(Path(sys.argv[1]), 'x'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(AccelkitError, match="x is at work"), alone_in(tmp_path / "s", "x"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / "s" / LOCK).exists()
    assert main("sample", "--model", model, "-o", tmp_path / "s", "--steps", "2")[0] == 0
