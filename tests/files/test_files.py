"""Files are whole or absent, and damage to them is noticed."""

import errno
import hashlib
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from accelkit.errors import AccelkitError
from accelkit.files import tensors
from accelkit.files import writing as files
from accelkit.files.documents import read_json
from accelkit.files.writing import DamagedError

ADVICE = "make it again"
RECORD = {"a": [1, 2.5, None], "b": {"10": "x", "2": "ü"}, "c": float("inf")}


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def zeroed(content, start):
    return content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]


def spread(content, count):
    """Return bits of a file at an odd distance, so that all eight places in a byte occur."""
    return range(0, 8 * len(content), (8 * len(content) // count) | 1)


TENSORS = {
    "half": torch.arange(2000).half(),
    "brain": torch.arange(7).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(256).to(torch.uint8),
    "matrix": torch.arange(3000.0).reshape(30, 100).t().contiguous(),
}


class TestWriting:
    @pytest.mark.parametrize("there", [None, "file", "folder", "link"])
    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_an_old_file_or_folder_is_replaced(self, tmp_path, there, kind):
        target = tmp_path / "deep" / "target"
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "file").write_text("kept")
        target.parent.mkdir()
        if there == "file":
            target.write_text("old")
        elif there == "folder":
            target.mkdir()
            (target / "old").write_text("old")
        elif there == "link":
            target.symlink_to(tmp_path / "kept")
        with files.writing(target) as part:
            if kind == "folder":
                part.mkdir()
            (part if kind == "file" else part / "file").write_text("new")
        assert (target if kind == "file" else target / "file").read_text() == "new"
        assert names(target.parent) == ["target"]
        assert (tmp_path / "kept" / "file").read_text() == "kept"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_an_error_keeps_the_old_file_or_folder(self, tmp_path, error, kind):
        target = tmp_path / "target"
        if kind == "folder":
            target.mkdir()
        kept = target if kind == "file" else target / "file"
        kept.write_text("old")
        with pytest.raises((KeyboardInterrupt, AccelkitError)), files.writing(target) as part:  # noqa: PT012
            part.write_text("half")
            (part.parent / ".tmpAbCd").write_text("of a library")
            raise error
        assert kept.read_text() == "old"
        assert names(tmp_path) == ["target"]

    def test_files_left_by_a_killed_process_are_removed(self, tmp_path):
        """These are temporary files of accelkit and of libraries."""
        (tmp_path / "a.json.partial").mkdir()
        (tmp_path / "a.json.partial" / ".tmpAbCd").write_text("half")
        (tmp_path / "b.json.partial").write_text("half, as earlier versions left it")
        for name in ("a.json", "b.json"):
            files.write_json(tmp_path / name, {"new": 1})
        assert names(tmp_path) == ["a.json", "b.json"]

    def test_flushed_before_the_rename_and_the_folder_after_it(self, tmp_path, monkeypatch):
        events = []
        flush, rename = os.fsync, os.replace

        def flushing(handle):
            events.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))
            flush(handle)

        def renaming(source, target, **options):
            events.append(("rename", os.fspath(target)))
            rename(source, target, **options)

        monkeypatch.setattr(os, "fsync", flushing)
        monkeypatch.setattr(os, "replace", renaming)
        files.write_json(tmp_path / "a.json", {})
        assert events == [
            ("flush", str(tmp_path / "a.json.partial" / "a.json")),
            ("rename", str(tmp_path / "a.json")),
            ("flush", str(tmp_path)),
        ]

    def test_a_folder_that_cannot_be_flushed(self, tmp_path, monkeypatch):
        """Some file systems do not support it."""
        flush = os.fsync

        def refusing(handle):
            if os.path.isdir(f"/proc/self/fd/{handle}"):
                raise OSError(errno.EINVAL, "Invalid argument")
            flush(handle)

        monkeypatch.setattr(os, "fsync", refusing)
        files.write_json(tmp_path / "a.json", {"a": 1})
        assert read_json(tmp_path / "a.json") == {"a": 1}

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
    @pytest.mark.parametrize("at", ["mkdir", "fsync", "replace"])
    def test_errors_are_one_line_with_advice(self, tmp_path, monkeypatch, number, at):
        files.write_json(tmp_path / "a.json", {"old": 1})

        def fails(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, at, fails)
        with pytest.raises(AccelkitError, match=r"(no room to|cannot) write .*a\.json") as caught:
            files.write_json(tmp_path / "a.json", {"new": 2})
        monkeypatch.undo()
        assert str(caught.value).count("\n") == 0
        assert "--resume latest: what was written before is intact" in str(caught.value)
        assert read_json(tmp_path / "a.json") == {"old": 1}
        assert names(tmp_path) == ["a.json"]


class TestRecords:
    def test_round_trip(self, tmp_path):
        files.write_record(tmp_path / "a.json", {**RECORD, "d": (1, 2), "e": {10: "x", 2: "y"}})
        expected = {**RECORD, "d": [1, 2], "e": {"10": "x", "2": "y"}}
        assert files.read_record(tmp_path / "a.json", ADVICE) == expected

    def test_the_checksum_is_that_of_the_sorted_rest(self, tmp_path):
        files.write_record(tmp_path / "a.json", {"b": 1, "a": [2]})
        stored = json.loads((tmp_path / "a.json").read_text())
        plain = subprocess.run(
            ["sha256sum"], input=b'{"a": [2], "b": 1}', capture_output=True, check=True
        )
        assert stored == {"b": 1, "a": [2], "sha256": plain.stdout.split()[0].decode()}

    @pytest.mark.parametrize("content", [{}, {"a": 1}, [], [1], "text", None])
    def test_files_without_a_checksum_are_taken_as_they_are(self, tmp_path, content):
        files.write_json(tmp_path / "a.json", content)
        assert files.read_record(tmp_path / "a.json", ADVICE) == content

    def test_layout_does_not_matter(self, tmp_path):
        files.write_record(tmp_path / "a.json", RECORD)
        found = json.loads((tmp_path / "a.json").read_text())
        (tmp_path / "a.json").write_text(json.dumps(found, sort_keys=True))
        assert files.read_record(tmp_path / "a.json", ADVICE) == RECORD

    def test_an_edit_is_refused_until_the_checksum_is_removed(self, tmp_path):
        path = tmp_path / "a.json"
        files.write_record(path, RECORD)
        edited = {**json.loads(path.read_text()), "a": 1}
        files.write_json(path, edited)
        with pytest.raises(DamagedError, match=r"a\.json is damaged.*make it again.*\"sha256\""):
            files.read_record(path, ADVICE)
        del edited["sha256"]
        files.write_json(path, edited)
        assert files.read_record(path, ADVICE) == {**RECORD, "a": 1}

    def test_no_flipped_bit_changes_what_is_read(self, tmp_path):
        path = tmp_path / "a.json"
        files.write_record(path, RECORD)
        content = path.read_bytes()
        refused, bits = 0, range(0, 8 * len(content), 3)
        for bit in bits:
            path.write_bytes(flipped(content, bit))
            try:
                found = files.read_record(path, ADVICE)
            except AccelkitError:
                refused += 1
            else:  # the bit was in white space, or in the key of the checksum
                assert {k: found[k] for k in RECORD} == RECORD
        assert refused > 0.7 * len(bits)


class TestTensors:
    def test_torch_round_trip(self, tmp_path):
        tensors.write_tensors(tmp_path / "a.safetensors", TENSORS)
        found = tensors.load_tensors(tmp_path / "a.safetensors", ADVICE)
        assert found.keys() == TENSORS.keys()
        for name, value in TENSORS.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
        assert names(tmp_path) == ["a.safetensors"]

    def test_numpy_round_trip(self, tmp_path):
        matrix = np.arange(20, dtype=np.float32).reshape(4, 5)
        rows = {"pooled": matrix, "turned": matrix.T, "part": matrix[:, ::2], "n": np.array(7)}
        tensors.write_tensors(tmp_path / "a.safetensors", rows)
        found = tensors.load_tensors(tmp_path / "a.safetensors", ADVICE)
        assert all(np.array_equal(found[name].numpy(), value) for name, value in rows.items())

    def test_equal_tensors_make_equal_files(self, tmp_path):
        for number in range(10):
            tensors.write_tensors(tmp_path / f"{number}.safetensors", TENSORS)
        assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1

    def test_other_programs_can_read_and_check_it(self, tmp_path):
        path = tmp_path / "a.safetensors"
        tensors.write_tensors(path, TENSORS)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        recorded = metadata["accelkit.sha256"]
        blank = path.read_bytes().replace(recorded.encode(), b"0" * 64)
        assert hashlib.sha256(blank).hexdigest() == recorded
        assert tensors.recorded_sum(path) == recorded

    def test_everyone_may_read_it_who_may_read_other_files(self, tmp_path):
        """safetensors itself writes for the owner alone."""
        (tmp_path / "plain").touch()
        tensors.write_tensors(tmp_path / "a.safetensors", TENSORS)
        modes = [(tmp_path / name).stat().st_mode for name in ("plain", "a.safetensors")]
        assert modes[0] == modes[1]

    def test_files_of_other_programs_are_taken_as_they_are(self, tmp_path):
        for metadata in (None, {"format": "pt"}, {"sha256": "another meaning"}):
            save_file(TENSORS, tmp_path / "a.safetensors", metadata=metadata)
            tensors.check_tensors(tmp_path / "a.safetensors", ADVICE)
            assert tensors.recorded_sum(tmp_path / "a.safetensors") is None

    @pytest.mark.parametrize(
        "content", [b"", b"1234567", b"\xff" * 100, b"\x10" + bytes(7), bytes(20)]
    )
    def test_unreadable_files_are_left_to_safetensors(self, tmp_path, content):
        (tmp_path / "a.safetensors").write_bytes(content)
        tensors.check_tensors(tmp_path / "a.safetensors", ADVICE)

    def test_damage_is_noticed_wherever_it_is(self, tmp_path):
        path = tmp_path / "a.safetensors"
        tensors.write_tensors(path, TENSORS)
        content = path.read_bytes()
        start = content.index(b'"accelkit.sha256"')
        own_name = range(start, start + len(b'"accelkit.sha256"'))  # without it there is no sum
        damaged = [
            flipped(content, bit) for bit in spread(content, 300) if bit // 8 not in own_name
        ]
        damaged += [zeroed(content, start) for start in range(4096, len(content), 4096)]
        damaged += [content[:-1], content[:-4096], content + b"\0"]
        for changed in damaged:
            path.write_bytes(changed)
            with pytest.raises(Exception, match=r"is damaged|[Ee]rror|header") as caught:
                tensors.load_tensors(path, ADVICE)
            if changed[8:9] == b"{" and changed[:start] == content[:start]:
                assert isinstance(caught.value, DamagedError)
        path.write_bytes(zeroed(content, 0))
        with pytest.raises(Exception, match="header"):
            tensors.load_tensors(path, ADVICE)

    def test_a_folder_is_checked_file_by_file(self, tmp_path):
        (tmp_path / "sub").mkdir()
        for name in ("a.safetensors", "sub/b.safetensors"):
            save_file(TENSORS, tmp_path / name, metadata={"format": "pt"})
        tensors.add_sums(tmp_path)
        tensors.check_tensors(tmp_path, ADVICE)
        path = tmp_path / "sub" / "b.safetensors"
        assert torch.equal(load_file(path)["half"], TENSORS["half"])
        path.write_bytes(flipped(path.read_bytes(), 8 * path.stat().st_size - 1))
        with pytest.raises(DamagedError, match=r"sub/b\.safetensors is damaged.*make it again"):
            tensors.check_tensors(tmp_path, ADVICE)

    def test_a_full_disk_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.safetensors"
        tensors.write_tensors(path, TENSORS)
        before = path.read_bytes()

        def full(tensors, part, metadata=None):
            part.write_bytes(b"the first bytes")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(AccelkitError, match="no room to write"):
            tensors.write_tensors(path, {"x": torch.ones(1)})
        assert path.read_bytes() == before
        assert names(tmp_path) == ["a.safetensors"]
