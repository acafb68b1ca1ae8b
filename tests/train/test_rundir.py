"""A run's directory: who may have it, and that a checkpoint is whole or absent."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from accelkit import files
from accelkit.errors import AccelkitError
from accelkit.train import rundir
from accelkit.train.rundir import RunDirectory

SETTINGS = {
    "job": "finetune",
    "train": {"steps": 5, "channels": (1, 2)},
    "evaluation": {"images": 9},
}
HOLD = """
import sys, time
from accelkit.train.rundir import RunDirectory
RunDirectory(sys.argv[1]).open({}, resume=False, overwrite=True, free=frozenset())
print("held", flush=True)
time.sleep(60)
"""


def opened(path, settings=SETTINGS, *, resume=False, overwrite=False, free=()):
    run = RunDirectory(path)
    try:
        run.open(settings, resume=resume, overwrite=overwrite, free=frozenset(free))
    except BaseException:
        run.close()
        raise
    return run


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "run"


@pytest.fixture
def run(path):
    run = opened(path)
    yield run
    run.close()


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(run, step, keep=0, content="weights"):
    with run.writing(step, keep, True, lambda: None) as folder:
        (folder / "model").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "optimizer").write_text(str(step))


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


class TestOpening:
    def test_new(self, run, path):
        assert json.loads((path / "run.json").read_text()) == json.loads(json.dumps(SETTINGS))
        assert run.latest() is None
        assert run.stored()["job"] == "finetune"

    def test_empty_directory(self, path):
        path.mkdir(parents=True)
        opened(path).close()

    def test_a_place_without_a_run_has_no_settings(self, tmp_path):
        assert RunDirectory(tmp_path / "none").stored() == {}

    @pytest.mark.parametrize("entry", ["run.json", "notes.txt", ".hidden"])
    def test_not_empty(self, path, entry):
        path.mkdir(parents=True)
        (path / entry).write_text("{}")
        with pytest.raises(
            AccelkitError, match=r"not empty.*--resume latest.*--overwrite"
        ) as caught:
            opened(path)
        one_line(caught)
        assert (path / entry).read_text() == "{}"

    @pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
    def test_a_file(self, tmp_path, how):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(AccelkitError, match="is a file"):
            opened(tmp_path / "file", **how)
        assert (tmp_path / "file").read_text() == "mine"

    def test_overwrite_removes_a_run(self, run, path, tmp_path):
        save(run, 3)
        run.close()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "kept").write_text("mine")
        (path / "link").symlink_to(tmp_path / "elsewhere")
        (path / "results.json").write_text("old")
        again = opened(path, {"job": "other"}, overwrite=True)
        assert names(path) == [".lock", "run.json"]
        assert again.stored() == {"job": "other"}
        assert (tmp_path / "elsewhere" / "kept").read_text() == "mine"
        again.close()

    def test_overwrite_removes_nothing_but_a_run(self, path):
        path.mkdir(parents=True)
        (path / "thesis.tex").write_text("mine")
        with pytest.raises(AccelkitError, match="no accelkit run"):
            opened(path, overwrite=True)
        assert names(path) == ["thesis.tex"]

    def test_overwrite_of_nothing(self, path):
        opened(path, overwrite=True).close()

    def test_overwriting_can_be_killed_at_any_point(self, run, path, monkeypatch):
        """What is left is still known as a run, so that overwriting can be tried again."""
        save(run, 3)
        for name in ("a.json", "z.json"):
            (path / name).write_text("old")
        run.close()
        remove, rmtree = Path.unlink, rundir.shutil.rmtree
        for survived in range(4):
            left = survived

            def dying(function):
                def act(entry, *args, **kwargs):
                    nonlocal left
                    if not left:
                        raise KeyboardInterrupt
                    left -= 1
                    return function(entry, *args, **kwargs)

                return act

            with monkeypatch.context() as patch:
                patch.setattr(Path, "unlink", dying(remove))
                patch.setattr(rundir.shutil, "rmtree", dying(rmtree))
                with pytest.raises(KeyboardInterrupt):
                    opened(path, overwrite=True)
            run = opened(path, overwrite=True)
            save(run, 3)
            for name in ("a.json", "z.json"):
                (path / name).write_text("old")
            run.close()


class TestResuming:
    def test_resume(self, run, path):
        save(run, 3)
        run.close()
        again = opened(path, resume=True)
        assert again.latest() == (3, path / "checkpoints" / "step-00000003")
        again.close()

    def test_before_the_first_checkpoint(self, run, path):
        run.close()
        again = opened(path, resume=True)
        assert again.latest() is None
        again.close()

    @pytest.mark.parametrize("content", [None, "notes.txt"])
    def test_no_run_to_resume(self, path, content):
        if content:
            path.mkdir(parents=True)
            (path / content).write_text("mine")
        with pytest.raises(AccelkitError, match=r"no run in .* to resume"):
            opened(path, resume=True)
        assert not (path / "run.json").exists()

    def test_other_settings_are_named(self, run, path):
        run.close()
        changed = {**SETTINGS, "train": {"steps": 6, "channels": (1, 2)}, "new": 1}
        with pytest.raises(AccelkitError, match="other settings") as caught:
            opened(path, changed, resume=True)
        message = one_line(caught)
        assert "train: {'steps': 5" in message
        assert "{'steps': 6" in message
        assert "new: None then, 1 now" in message
        assert "job" not in message
        assert run.stored()["train"]["steps"] == 5
        opened(path, resume=True).close()  # the refusal leaves it as it was

    def test_a_setting_that_is_missing_now(self, run, path):
        run.close()
        with pytest.raises(AccelkitError, match="job: 'finetune' then, None now"):
            opened(path, {k: v for k, v in SETTINGS.items() if k != "job"}, resume=True)

    def test_a_setting_that_the_run_did_not_know_yet(self, run, path):
        run.close()
        newer = {**SETTINGS, "train": {**SETTINGS["train"], "new": None}}
        opened(path, newer, resume=True).close()
        opened(path, SETTINGS, resume=True).close()
        with pytest.raises(AccelkitError, match=r"train: .*'new': 1\} now"):
            opened(path, {**SETTINGS, "train": {**SETTINGS["train"], "new": 1}}, resume=True)

    def test_free_settings_may_differ(self, run, path):
        run.close()
        changed = {**SETTINGS, "evaluation": {"images": 10}}
        again = opened(path, changed, resume=True, free=["evaluation"])
        assert again.stored()["evaluation"] == {"images": 10}
        again.close()
        with pytest.raises(AccelkitError, match="evaluation"):
            opened(path, resume=True)

    def test_broken_settings(self, run, path):
        run.close()
        (path / "run.json").write_text("{")
        with pytest.raises(AccelkitError, match="cannot read the run's settings") as caught:
            opened(path, resume=True)
        one_line(caught)


class TestOneRunAtATime:
    @pytest.mark.parametrize("how", [{"resume": True}, {"overwrite": True}])
    def test_second_handle(self, run, path, how):
        save(run, 3)
        with pytest.raises(AccelkitError, match="another run is at work") as caught:
            opened(path, **how)
        one_line(caught)
        assert run.latest() == (3, path / "checkpoints" / "step-00000003")

    def test_closing_lets_go(self, run, path):
        run.close()
        run.close()
        opened(path, resume=True).close()

    def test_another_process_until_it_is_killed(self, path):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(rundir.__file__).parents[2])},
        )
        try:
            assert holder.stdout.readline() == b"held\n"
            for how in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(AccelkitError, match="another run is at work"):
                    opened(path, {}, **how)
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            holder.stdout.close()
        opened(path, {}, resume=True).close()


class TestCheckpoints:
    def test_content_is_renamed_into_place(self, run):
        with run.writing(7, 0, True, lambda: None) as folder:
            assert folder.is_dir()
            assert run.latest() is None
            (folder / "model").write_text("weights")
        assert names(run.checkpoints) == ["step-00000007"]
        assert (run.latest()[1] / "model").read_text() == "weights"

    @pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
    def test_an_error_leaves_the_older_one(self, run, error):
        save(run, 3)
        with (  # noqa: PT012 - what is in question is the block
            pytest.raises(type(error)),
            run.writing(6, 1, True, lambda: None) as folder,
        ):
            (folder / "model").write_text("half")
            raise error
        assert names(run.checkpoints) == ["step-00000003"]
        assert (run.latest()[1] / "model").read_text() == "weights"
        save(run, 6)
        assert run.latest()[0] == 6

    def test_other_errors_keep_their_words(self, run):
        with (
            pytest.raises(RuntimeError, match=r"^boom$"),
            run.writing(6, 1, True, lambda: None),
        ):
            raise RuntimeError("boom")

    def test_keeps_the_newest(self, run):
        for step in (9, 10, 99, 100, 20_000_000):
            save(run, step, keep=2)
        assert [run.latest()[0], len(names(run.checkpoints))] == [20_000_000, 2]
        assert names(run.checkpoints) == ["step-00000100", "step-20000000"]

    def test_keeps_all(self, run):
        for step in range(1, 6):
            save(run, step, keep=0)
        assert len(names(run.checkpoints)) == 5

    @pytest.mark.parametrize(
        "stray",
        ["step-foo", "step-00000010.bak", "step-3", "step--0000009", "partial-x", "notes.txt"],
    )
    @pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
    def test_strays_are_no_checkpoints(self, run, stray, make):
        run.checkpoints.mkdir(parents=True)
        make(run.checkpoints / stray)
        assert run.latest() is None
        for step in (8, 9):
            save(run, step, keep=1)
            assert run.latest()[0] == step
        assert names(run.checkpoints) == sorted([stray, "step-00000009"])

    def test_a_file_is_no_checkpoint(self, run):
        save(run, 8)
        (run.checkpoints / "step-00000009").touch()
        assert run.latest()[0] == 8

    def test_stale_partial_folders_are_removed(self, run):
        stale = run.checkpoints / "partial-00000002"
        stale.mkdir(parents=True)
        (stale / "half").write_text("half")
        assert run.latest() is None
        save(run, 2)
        assert names(run.checkpoints) == ["step-00000002"]
        assert names(run.latest()[1]) == ["model", "sub"]

    def test_written_again(self, run):
        save(run, 2, content="old")
        save(run, 2, content="new")
        assert (run.latest()[1] / "model").read_text() == "new"

    def test_what_is_on_the_disk_before_the_rename(self, run, monkeypatch):
        flushed, events = os.fsync, []
        monkeypatch.setattr(os, "fsync", lambda file: (events.append("flush"), flushed(file)))
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1]
        )
        save(run, 1)
        assert events == ["flush", "flush", "rename"]

    def test_processes_meet_before_and_after_writing(self, run):
        events = []
        save_dir = run.checkpoints / "partial-00000004"

        def barrier():
            events.append((save_dir.is_dir(), run.latest() is not None))

        with run.writing(4, 0, True, barrier) as folder:
            events.append("write")
            (folder / "model").write_text("weights")
        assert events == [(True, False), "write", (True, False)]

    def test_another_process_neither_makes_nor_renames(self, run):
        with run.writing(4, 1, False, lambda: None) as folder:
            assert not folder.exists()
        assert not run.checkpoints.exists()


class TestFullDisk:
    """One line that says what to do, and the last checkpoint is as it was."""

    def expect(self, run, error):
        assert isinstance(error, AccelkitError)
        assert "\n" not in str(error)
        assert "no room to write" in str(error)
        assert "--resume latest" in str(error)
        assert [n for n in names(run.checkpoints) if n.startswith("step-")] == ["step-00000003"]
        assert (run.latest()[1] / "model").read_text() == "weights"

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
            Exception("I/O error: No space left on device (os error 28)"),
        ],
        ids=["space", "quota", "torch", "safetensors"],
    )
    def test_writing(self, run, error):
        save(run, 3)
        with pytest.raises(AccelkitError) as caught, run.writing(6, 1, True, lambda: None):
            raise error
        self.expect(run, caught.value)
        assert names(run.checkpoints) == ["step-00000003"]

    def test_making_the_folder(self, run, monkeypatch):
        save(run, 3)
        monkeypatch.setattr(Path, "mkdir", full_disk)
        with pytest.raises(Exception) as caught, run.writing(6, 1, True, lambda: None):  # noqa: PT011
            pass
        self.expect(run, caught.value)

    def test_bringing_it_to_the_disk(self, run, monkeypatch):
        """File systems that allocate late find out here."""
        save(run, 3)
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            save(run, 6)
        self.expect(run, caught.value)

    def test_settings(self, path, monkeypatch):
        """The directory can be used once there is room again."""
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full_disk)
            with pytest.raises(AccelkitError, match="no room to write") as caught:
                opened(path)
        one_line(caught)
        opened(path).close()

    def test_small_files_are_whole_or_absent(self, tmp_path, monkeypatch):
        target = tmp_path / "results.json"
        files.write_json(target, {"old": 1})
        monkeypatch.setattr(Path, "replace", full_disk)
        with pytest.raises(AccelkitError):
            files.write_json(target, {"new": 2})
        assert files.read_json(target) == {"old": 1}
