"""What was measured is found again, by what it depends on."""

import json
import warnings

import pytest

from accelkit.bench.cells import Cells
from accelkit.errors import AccelkitError, AccelkitWarning


@pytest.fixture
def cells(tmp_path):
    return Cells(tmp_path / "cells")


def test_nothing_is_made_twice(cells):
    made = []

    def make():
        made.append(1)
        return {"fid": 1.25}

    for order in ({"a": 1, "b": [2]}, {"b": [2], "a": 1}):
        assert cells.made(order, make) == {"fid": 1.25}
    assert Cells(cells.folder).made({"a": 1, "b": [2]}, make) == {"fid": 1.25}
    assert len(made) == 1
    cells.made({"a": 2, "b": [2]}, make)
    assert len(made) == 2


def test_what_failed_is_made_again(cells):
    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells.made({"a": 1}, fails)
    assert cells.made({"a": 1}, lambda: 5) == 5


def test_a_cell_tells_what_it_is_of(cells):
    cells.put({"a": 1}, [1, 2])
    stored = json.loads((cells.path({"a": 1}) / "cell.json").read_text())
    assert len(stored.pop("sha256")) == 64
    assert stored == {"settings": {"a": 1}, "result": [1, 2]}


def test_what_it_was_made_of_is_removed_and_files_stay(cells):
    folder = cells.path({"a": 1})
    (folder / "features").mkdir(parents=True)
    (folder / "features" / "0.safetensors").write_bytes(b"rows")
    (folder / "samples.png").write_bytes(b"png")
    cells.put({"a": 1}, 1)
    assert {p.name for p in folder.iterdir()} == {"cell.json", "samples.png"}


def test_two_benches_do_not_share_a_folder(cells):
    with (
        cells.claimed(),
        pytest.raises(AccelkitError, match="another bench is at work"),
        Cells(cells.folder).claimed(),
    ):
        pass
    with cells.claimed():
        pass


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_damaged_cell_is_made_again(cells):
    settings, result = {"a": 1, "steps": [5, 10]}, {"fid": 12.625, "missing": None}
    cells.put(settings, result)
    path = cells.path(settings) / "cell.json"
    content = path.read_bytes()
    damaged = [flipped(content, bit) for bit in range(0, 8 * len(content), 5)]
    damaged += [content[:-9], b"", b"{}", b"[]", bytes(len(content))]
    warned = 0
    for changed in damaged:
        path.write_bytes(changed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert cells.made(settings, lambda: result) == result
        for warning in caught:
            warned += 1
            assert issubclass(warning.category, AccelkitWarning)
            assert f"cannot use {path} (" in str(warning.message)
            assert str(warning.message).endswith("; measuring again")
    assert warned > 0.7 * len(damaged)  # a bit of white space, say, does no harm
    assert cells.get(settings) == result


def test_a_cell_under_another_name_is_made_again(cells):
    cells.put({"a": 1}, "one")
    cells.path({"a": 1}).rename(cells.path({"a": 2}))
    with pytest.warns(AccelkitWarning, match=r"cell\.json \(it has other settings\); measuring"):
        assert cells.made({"a": 2}, lambda: "two") == "two"


def test_a_cell_of_an_earlier_version_is_taken(cells):
    path = cells.path({"a": (1, 2)})
    path.mkdir(parents=True)
    (path / "cell.json").write_text('{"settings": {"a": [1, 2]}, "result": 5}')
    assert cells.get({"a": (1, 2)}) == 5


def test_what_a_killed_bench_did_not_remove_is_removed(cells, monkeypatch):
    """Killed after a cell was finished; the features of one that was not are gone on with."""
    for name in (1, 2):
        (cells.path({"a": name}) / "features").mkdir(parents=True)
        (cells.path({"a": name}) / "features" / "0.safetensors").write_bytes(b"rows")

    def dies(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("accelkit.bench.cells._remove_folders", dies)
        with pytest.raises(KeyboardInterrupt):
            cells.put({"a": 1}, "one")
    with cells.claimed():
        assert not (cells.path({"a": 1}) / "features").exists()
        assert (cells.path({"a": 2}) / "features" / "0.safetensors").exists()
        assert cells.get({"a": 1}) == "one"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AccelkitError, match="cannot write to"), Cells(tmp_path / "file").claimed():
        pass
