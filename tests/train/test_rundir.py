"""A run's directory: who may use it, and that a checkpoint is whole or absent."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

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


def opened(path, settings=SETTINGS, *, resume=False, free=(), **options):
    run = RunDirectory(path)
    options = {"overwrite": False, **options}
    try:
        run.open(settings, resume=resume, free=frozenset(free), **options)
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
        stored = json.loads((path / "run.json").read_text())
        assert len(stored.pop("sha256")) == 64
        assert stored == json.loads(json.dumps(SETTINGS))
        assert run.latest() is None
        assert run.stored()["job"] == "finetune"

    def test_empty_directory(self, path):
        path.mkdir(parents=True)
        opened(path).close()

    def test_a_place_without_a_run_has_no_settings(self, tmp_path):
        assert RunDirectory(tmp_path / "none").stored() == {}

    def test_not_empty(self, run, path):
        run.close()
        before = (path / "run.json").read_text()
        with pytest.raises(
            AccelkitError, match=r"not empty.*--resume latest.*--overwrite"
        ) as caught:
            opened(path)
        one_line(caught)
        assert (path / "run.json").read_text() == before

    @pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
    @pytest.mark.parametrize("entry", ["notes.txt", ".hidden"])
    def test_files_of_others(self, path, entry, how):
        """Neither --resume latest nor --overwrite works, so neither is advised."""
        path.mkdir(parents=True)
        (path / entry).write_text("mine")
        with pytest.raises(AccelkitError, match=r"no (accelkit )?run.*another -o$") as caught:
            opened(path, **how)
        message = one_line(caught)
        assert not {"--resume latest", "with --overwrite"} & set(message.split(", "))
        assert names(path) == [entry]

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
        """The rest is still known as a run, so overwriting can be tried again."""
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
        assert "(new: None then, 1 now; train.steps: 5 then, 6 now)" in message
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
        with pytest.raises(AccelkitError, match=r"\(train\.new: None then, 1 now\)"):
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
        for how in ({}, {"resume": True}):
            with pytest.raises(AccelkitError, match="cannot read the run's settings") as caught:
                opened(path, **how)
            assert "; start over with --overwrite" in one_line(caught)
        opened(path, overwrite=True).close()

    @pytest.mark.parametrize("content", ["[]", "3", "null"])
    def test_settings_of_something_else(self, run, path, content):
        run.close()
        (path / "run.json").write_text(content)
        with pytest.raises(AccelkitError, match=r"no settings of a run; start over with --over"):
            opened(path, resume=True)

    def test_damaged_settings(self, run, path):
        run.close()
        stored = (path / "run.json").read_text()
        (path / "run.json").write_text(stored.replace('"steps": 5', '"steps": 7'))
        for how in ({}, {"resume": True}):
            with pytest.raises(AccelkitError, match=r"run\.json is damaged.*--overwrite") as caught:
                opened(path, **how)
            one_line(caught)

    def test_other_data_under_the_same_name(self, run, path):
        run.close()
        run = opened(path, resume=True)
        run.identify({"images": "1", "model": "2"})  # a run of an earlier version has none
        run.close()
        for changed, words in (
            ({"images": "3", "model": "2"}, "the images changed since the run in"),
            ({"images": "3", "model": "4"}, "the images and the model changed since"),
        ):
            run = opened(path, resume=True)
            with pytest.raises(AccelkitError, match=words) as caught:
                run.identify(changed)
            assert "--overwrite" in one_line(caught)
            run.close()
        run = opened(path, resume=True)
        run.identify({"images": "1", "model": "2", "captions": "5"})
        assert {k: run.stored()[k] for k in SETTINGS} == json.loads(json.dumps(SETTINGS))
        run.close()
        run = opened(path, overwrite=True)
        run.identify({"images": "3"})
        run.close()

    @pytest.mark.parametrize("fingerprints", ["null", "[]", "3"])
    def test_fingerprints_that_are_none(self, run, path, fingerprints):
        run.close()
        (path / "run.json").write_text(f'{{"fingerprints": {fingerprints}}}')
        with pytest.raises(
            AccelkitError, match=r"holds no settings of a run; start over"
        ) as caught:
            opened(path, resume=True)
        one_line(caught)

    def test_a_lock_that_cannot_be_made(self, run, path):
        run.close()
        (path / ".lock").unlink()
        (path / ".lock").mkdir()
        with pytest.raises(AccelkitError, match=r"cannot write to .*another -o") as caught:
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

    @pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
    def test_one_that_was_refused_leaves_the_others_alone(self, run, path, how):
        """Only the process that opened a run abandons it, which removes bare settings."""
        other = RunDirectory(path)
        with pytest.raises(AccelkitError):
            other.open(SETTINGS, free=frozenset(), **{"resume": False, "overwrite": False} | how)
        other.abandon()
        other.close()
        assert names(path) == [".lock", "run.json"]
        run.abandon()
        assert not path.exists()

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
        assert names(run.latest()[1]) == ["checksums.json", "model", "sub"]

    def test_written_again(self, run):
        save(run, 2, content="old")
        save(run, 2, content="new")
        assert (run.latest()[1] / "model").read_text() == "new"

    def test_what_is_on_the_disk_before_the_rename_and_after(self, run, monkeypatch):
        flushed, events = os.fsync, []
        rename = Path.rename

        def flush(handle):
            events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
            flushed(handle)

        def renames(self, to):
            events.append("rename")
            return rename(self, to)

        monkeypatch.setattr(os, "fsync", flush)
        monkeypatch.setattr(Path, "rename", renames)
        save(run, 1)
        place = events.index("rename")
        assert {"model", "optimizer", "sub", "partial-00000001", "checksums.json"} == set(
            events[:place]
        ) - {"checksums.json.partial"}
        assert events[place + 1 :] == ["checkpoints", "run"]

    def test_checksums_are_those_of_sha256sum(self, run):
        save(run, 1)
        folder = run.latest()[1]
        sums = json.loads((folder / "checksums.json").read_text())["files"]
        listed = "".join(f"{found}  {name}\n" for name, found in sums.items())
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", "-"],
            cwd=folder,
            input=listed.encode(),
            capture_output=True,
        )
        assert done.stdout.decode().splitlines() == ["model: OK", "sub/optimizer: OK"]
        assert run.check(folder)

    def test_a_damaged_file_is_named(self, run):
        save(run, 1)
        folder = run.latest()[1]
        (folder / "sub" / "optimizer").write_text("2")
        with pytest.raises(AccelkitError, match="sub/optimizer is damaged"):
            run.check(folder)
        (folder / "sub" / "optimizer").unlink()
        with pytest.raises(AccelkitError, match="sub/optimizer is missing"):
            run.check(folder)

    def test_one_of_an_earlier_version_has_no_checksums(self, run):
        save(run, 1)
        (run.latest()[1] / "checksums.json").unlink()
        assert not run.check(run.latest()[1])

    def test_what_is_not_kept_is_never_seen_half_gone(self, run, monkeypatch):
        save(run, 1)

        def dies(path, *args, **kwargs):
            (path / "model").unlink()
            raise KeyboardInterrupt

        monkeypatch.setattr(rundir.shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            save(run, 2, keep=1)
        monkeypatch.undo()
        assert run.latest()[0] == 2
        assert [step for step in names(run.checkpoints) if step.startswith("step")] == [
            "step-00000002"
        ]
        save(run, 3, keep=1)
        assert names(run.checkpoints) == ["step-00000003"]

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
    """One line gives the remedy, and the last checkpoint is intact."""

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
        """Where file systems that allocate late fail."""
        save(run, 3)
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            save(run, 6)
        self.expect(run, caught.value)

    def test_settings(self, path, monkeypatch):
        """The directory works once there is room again."""
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full_disk)
            with pytest.raises(AccelkitError, match="no room to write") as caught:
                opened(path)
        one_line(caught)
        opened(path).close()


class TestKills:
    """After a kill at any point, the same command works, or names an option that does."""

    @staticmethod
    def begin(path):
        opened(path).close()

    @staticmethod
    def train(path):
        run = opened(path)
        for step in (1, 2):
            save(run, step, keep=1)
        run.close()

    @staticmethod
    def overwrite(path):
        opened(path, overwrite=True).close()

    @staticmethod
    def resume(path):
        run = opened(path, resume=True)
        save(run, 4, keep=1)
        run.close()

    @staticmethod
    def abandon(path):
        run = opened(path)
        run.abandon()
        run.close()

    @pytest.mark.parametrize(
        ("before", "job"),
        [
            *((None, job) for job in ("begin", "train", "abandon")),
            *((before, job) for before in ("begin", "train") for job in ("overwrite", "resume")),
        ],
    )
    def test_no_dead_end(self, tmp_path, monkeypatch, before, job):
        monkeypatch.setattr(os, "fsync", lambda handle: None)  # slow, and without effect on a kill
        for number in range(1, 1000):
            path = tmp_path / str(number)
            if before:
                getattr(self, before)(path)
            survived = killed_before_file_operation(number, lambda p=path: getattr(self, job)(p))
            self.check_ways_out(path)
            if survived:
                break
        assert number > 8  # or nothing was tried

    def check_ways_out(self, path):
        known = RunDirectory(path)
        if latest := known.latest():
            assert known.check(latest[1])
        try:
            opened(path).close()
        except AccelkitError as error:
            message = str(error)
        else:
            return
        ways = [{"resume": True}] * ("--resume latest" in message)
        ways += [{"overwrite": True}] * ("--overwrite" in message)
        assert ways, message
        for place, how in enumerate(ways):
            copy = path.with_name(f"{path.name}-{place}")
            shutil.copytree(path, copy)
            opened(copy, **how).close()

    @pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
    def test_killed_before_there_were_settings(self, path, make):
        """As this version and earlier ones leave it."""
        for how in ({}, {"overwrite": True}):
            path.mkdir(parents=True, exist_ok=True)
            make(path / "run.json.partial")
            (path / ".lock").touch()
            with pytest.raises(AccelkitError, match=r"no run in .* leave --resume out$"):
                opened(path, resume=True)
            opened(path, **how).close()
            assert names(path) == [".lock", "run.json"]
            shutil.rmtree(path)


def killed_before_file_operation(number, act):
    """Run ``act`` in a process that dies before its n-th file change; return whether it lived."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    try:
        left = number

        def count(event, args):
            nonlocal left
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            if changes or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
                left -= 1
                if not left:
                    os._exit(9)

        sys.addaudithook(count)
        act()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(9)


def test_a_run_from_before_a_setting_existed_resumes_with_its_default(path):
    opened(path, {"train": {"steps": 2}}).close()
    defaults = {"train": {"steps": 200, "restarts": 1}}
    with pytest.raises(AccelkitError, match="restarts: 1 then, 3 now"):
        opened(path, {"train": {"steps": 2, "restarts": 3}}, resume=True, defaults=defaults)
    opened(path, {"train": {"steps": 2, "restarts": 1}}, resume=True, defaults=defaults).close()
