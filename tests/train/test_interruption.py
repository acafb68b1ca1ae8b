"""Runs that are killed, stopped or damaged, and resumed to the same weights.

Run as a script, this is the run that is killed.
"""

import json
import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_run import CONFIG, SHORT, Toy, assert_same, fit, latest, script

from accelkit.errors import AccelkitError, Stopped
from accelkit.train.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("one_cpu")


def test_killed_between_checkpoints(tmp_path, uninterrupted):
    process = script(__file__, tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert latest(tmp_path) == 3
    steps = []
    model = fit(tmp_path, on_step=lambda progress: steps.append(progress.step))
    assert steps == [4, 5, 6, 7, 8]
    assert_same(model, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(tmp_path, uninterrupted, number):
    steps = []

    def on_step(progress):
        steps.append(progress.step)
        if progress.step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=number.name) as caught:
        fit(tmp_path, on_step=on_step, checkpoint_every=3)
    assert caught.value.signum == number
    assert f"after step {steps[-1]};" in str(caught.value)
    assert latest(tmp_path) == steps[-1] <= 5  # the step under way is finished
    assert_same(fit(tmp_path), uninterrupted)


def test_signal_while_a_checkpoint_is_written(tmp_path, uninterrupted, monkeypatch):
    rename = Path.rename

    def interrupted(self, target):
        if target.name.startswith("step-"):
            os.kill(os.getpid(), signal.SIGTERM)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(Stopped, match="after step 4"):
            fit(tmp_path, checkpoint_every=3)
    assert_same(fit(tmp_path), uninterrupted)


def test_signal_in_the_last_step(tmp_path, uninterrupted):
    """No step is left to resume with: the run ends normally."""

    def on_step(progress):
        if progress.step == CONFIG.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    assert_same(fit(tmp_path, on_step=on_step), uninterrupted)
    assert latest(tmp_path) == CONFIG.steps


def test_a_finished_run_gives_its_weights_again(tmp_path, uninterrupted):
    fit(tmp_path)
    steps = []
    assert_same(fit(tmp_path, on_step=steps.append), uninterrupted)
    assert steps == []


def test_not_finite(tmp_path, uninterrupted):
    poisoned = Toy(lambda call, x: x * torch.nan if call >= 5 else x)
    with pytest.raises(AccelkitError, match="nan at step 5; the checkpoint of step 3") as caught:
        fit(tmp_path, samples=poisoned, checkpoint_every=3)
    assert "\n" not in str(caught.value)
    assert_same(fit(tmp_path), uninterrupted)


def test_not_finite_before_any_checkpoint(tmp_path):
    with pytest.raises(AccelkitError, match="nan at step 1; no checkpoint was written"):
        fit(tmp_path, samples=Toy(lambda call, x: x * torch.nan))
    assert RunDirectory(tmp_path).latest() is None


def test_full_disk(tmp_path, uninterrupted, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def on_step(progress):
        if progress.step == 5:
            monkeypatch.setattr(torch, "save", full)

    with pytest.raises(AccelkitError, match="no room to write") as caught:
        fit(tmp_path, on_step=on_step, checkpoint_every=3)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert latest(tmp_path) == 3
    assert_same(fit(tmp_path), uninterrupted)


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(path):
    path.write_bytes(flip(0.5)(path.read_bytes()))


def rename_a_weight(path):
    tensors = load_file(path)
    tensors["another.weight"] = tensors.pop("proj_out_2.weight")
    save_file(tensors, path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of steps 3, 6 and 8; copy it, do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        folder = tmp_path_factory.mktemp("runs") / "finished"
        fit(folder, checkpoint_every=3, keep=0)
    return folder


@pytest.fixture
def newest(finished, tmp_path):
    """The newest checkpoint of a copy in ``tmp_path``."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return RunDirectory(tmp_path).latest()[1]


def refused(folder):
    """Return the reason why a run cannot be resumed."""
    with pytest.raises(AccelkitError, match=r"cannot read the checkpoint .*: ") as caught:
        fit(folder)
    message = str(caught.value)
    assert message.endswith("; remove it to go on from the one before")
    assert "\n" not in message
    return message


def test_broken_checkpoint(newest, tmp_path, uninterrupted):
    """Whichever file is damaged or missing, one line gives the remedy, and the remedy works.

    Damage is found even in files that would load without an error.
    """
    entries = sorted(newest.iterdir())
    assert [entry.name for entry in entries] == [
        "checksums.json",
        "loop.pt",
        "model.safetensors",
        "optimizer.bin",
        "random_states_0.pkl",
    ]
    sums, loop, model, optimizer, _ = entries
    ways = [(entry, flipped) for entry in entries[1:]]
    ways += [(sums, halve), (loop, halve), (model, rename_a_weight), (optimizer, Path.unlink)]
    for entry, spoil in ways:
        content = entry.read_bytes()
        spoil(entry)
        expected = f": {entry.name} is damaged" if spoil is flipped else entry.name
        assert expected in refused(tmp_path)
        entry.write_bytes(content)
    shutil.rmtree(newest)
    assert_same(fit(tmp_path), uninterrupted)


def flip(place):
    def spoil(content):
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]

    return spoil


def zero(place):
    def spoil(content):
        at = int(place * max(0, len(content) - 4096))
        return content[:at] + bytes(min(4096, len(content))) + content[at + 4096 :]

    return spoil


DAMAGE = [what(at) for what in (flip, zero) for at in (0.1, 0.5, 0.9)]
NAMES = ["model.safetensors", "optimizer.bin", "loop.pt", "random_states_0.pkl"]


def test_damaged_checkpoint(newest, tmp_path):
    run = RunDirectory(tmp_path)
    for name in NAMES:
        content = (newest / name).read_bytes()
        for damage in DAMAGE:
            spoilt = damage(content)
            assert spoilt != content
            (newest / name).write_bytes(spoilt)
            with pytest.raises(AccelkitError, match=f"^{name} is damaged"):
                run.check(newest)
        (newest / name).write_bytes(content)


def test_damaged_list_of_checksums(newest, tmp_path):
    content = (newest / "checksums.json").read_bytes()
    for place in range(0, 400, 7):
        (newest / "checksums.json").write_bytes(flip(place / 400)(content))
        try:
            RunDirectory(tmp_path).check(newest)
        except AccelkitError:
            continue
        listed = json.loads((newest / "checksums.json").read_text())["files"]
        assert listed == json.loads(content)["files"]  # only white space or the sum's name changed


def test_a_list_of_checksums_of_another_form(newest, tmp_path):
    for content in ("{}", "[]", '{"files": {}}', '{"files": 3}'):
        (newest / "checksums.json").write_text(content)
        with pytest.raises(AccelkitError, match=r"checksums\.json is damaged"):
            RunDirectory(tmp_path).check(newest)


def test_files_that_the_list_lacks(newest, tmp_path):
    (newest / ".DS_Store").touch()
    RunDirectory(tmp_path).check(newest)
    (newest / "scaler.pt").touch()
    assert "scaler.pt is not in checksums.json" in refused(tmp_path)


def test_a_renamed_checkpoint(newest, tmp_path):
    first = newest.with_name("step-00000003")
    shutil.rmtree(newest)
    first.rename(newest)
    assert "it belongs to step 3" in refused(tmp_path)


def as_before_checksums(folder):
    """Turn a checkpoint into one of earlier versions: no list, and the rate's step alone."""
    (folder / "checksums.json").unlink()
    state = torch.load(folder / "loop.pt", weights_only=True)
    del state["step"]
    torch.save(state, folder / "loop.pt")


def test_checkpoints_of_earlier_versions(newest, tmp_path, uninterrupted):
    shutil.rmtree(newest)
    _, six = RunDirectory(tmp_path).latest()
    as_before_checksums(six)
    assert_same(fit(tmp_path), uninterrupted)
    shutil.rmtree(newest)
    six.rename(newest)
    assert "it belongs to step 6" in refused(tmp_path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    fit(tmp_path / "run", SHORT)
    newest = RunDirectory(tmp_path / "run").latest()[1]
    as_before_checksums(newest)  # which would stop the bombs
    pickles = [entry for entry in newest.iterdir() if entry.suffix != ".safetensors"]
    assert len(pickles) == 3
    for entry in pickles:
        content = entry.read_bytes()
        torch.save(Bomb(tmp_path / f"{entry.name} exploded"), entry)
        with suppress(AccelkitError):
            fit(tmp_path / "run", SHORT)
        entry.write_bytes(content)
    assert list(tmp_path.glob("*exploded")) == []


def test_in_another_thread(tmp_path, uninterrupted):
    """Where signals cannot be caught."""
    models = []
    thread = threading.Thread(target=lambda: models.append(fit(tmp_path)))
    thread.start()
    thread.join(timeout=60)
    assert_same(models[0], uninterrupted)


def killed(folder):
    def on_step(progress):
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    fit(folder, checkpoint_every=3, on_step=on_step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    killed(Path(sys.argv[1]))
