"""What was measured is found again, by what it depends on."""

import json

import pytest

from accelkit.bench.cells import Cells
from accelkit.errors import AccelkitError


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


def test_a_broken_cell_is_named(cells):
    cells.put({"a": 1}, 1)
    (cells.path({"a": 1}) / "cell.json").write_text("{")
    with pytest.raises(AccelkitError, match=r"cannot read .*cell\.json"):
        cells.get({"a": 1})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AccelkitError, match="cannot write to"), Cells(tmp_path / "file").claimed():
        pass
