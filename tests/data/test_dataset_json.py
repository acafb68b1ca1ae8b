"""``dataset.json`` of NVlabs' tools: labels are read as its own reader does, or refused."""

import json

import numpy as np
import pytest
from picture_files import levels, png, refused, write_folder, write_zip

from accelkit.data import open_source
from accelkit.errors import AccelkitError

NUMBERS = [*range(20), *range(1000, 1010)]  # the last ten are in a second shard
NAMES = [f"{i // 1000:05d}/img{i:08d}.png" for i in NUMBERS]
LABELS = np.random.default_rng(0).permutation(30).tolist()
LABELS = [label % 10 for label in LABELS]
FILES = {name: png(label) for name, label in zip(NAMES, LABELS, strict=True)}


def with_labels(labels, files=FILES):
    return {**files, "dataset.json": json.dumps({"labels": labels})}


def some(files=20):
    return dict(list(FILES.items())[:files])


def as_numbers():
    return list(zip(NAMES, LABELS, strict=True))


def as_floats():
    return [[name, float(label)] for name, label in as_numbers()]


def one_hot():
    return [[name, [float(label == c) for c in range(10)]] for name, label in as_numbers()]


def in_another_order():
    return as_numbers()[::-1]


def written_on_windows():
    return [[name.replace("/", "\\"), label] for name, label in as_numbers()]


WAYS = [as_numbers, as_floats, one_hot, in_another_order, written_on_windows]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_labels_are_those_recorded(way, tmp_path):
    source = open_source(write_zip(tmp_path / "d.zip", with_labels(way())))
    assert source.classes == tuple("0123456789")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == levels(source) == LABELS


@pytest.mark.parametrize("top", ["", "set/"])
def test_one_shard_keeps_its_labels(top, tmp_path):
    """The only folder is not listed alone, without the labels next to it."""
    names = list(some())
    content = with_labels([[n, 3 if i else 7] for i, n in enumerate(names)], some())
    archive = write_zip(tmp_path / "d.zip", {top + name: c for name, c in content.items()})
    for place in (archive, write_folder(tmp_path / "d", content)):
        source = open_source(place)
        assert source.labels.tolist() == [7] + [3] * 19
        assert (source.classes, source.class_labels) == (("3", "7"), (3, 7))


def test_folders_are_no_classes_where_there_are_no_labels(tmp_path):
    source = open_source(write_zip(tmp_path / "d.zip", with_labels(None)))
    assert (source.labels, source.classes) == (None, ())
    bare = open_source(write_folder(tmp_path / "d", FILES))  # without dataset.json
    assert (bare.labels, bare.classes) == (None, ())


def test_a_file_of_something_else_is_passed_over(tmp_path):
    files = {"cat/0.png": png(0), "dog/0.png": png(1), "dataset.json": '{"name": "pets"}'}
    source = open_source(write_folder(tmp_path, files))
    assert source.classes == ("cat", "dog")
    assert source.notes == ("other files passed over: 1 (1 .json)",)


def test_rows_of_files_that_are_not_there_are_counted(tmp_path):
    labels = [[name, 0] for name in NAMES[:23]]
    source = open_source(write_folder(tmp_path, with_labels(labels, some())))
    assert source.notes == ("rows that name no image: 3",)
    assert source.labels.tolist() == [0] * 20


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[n, 1] for n in NAMES[:19]], "1 of 20 images .* no label, e.g. 00000/img00000019.png"),
        ([], r"holds \[\] where labels are expected"),
        ({"a.png": 1}, "where labels are expected"),
        ([[n, [0.25, 0.75]] for n in NAMES], "whole numbers or one-hot"),
        ([[n, [1, 1]] for n in NAMES], "whole numbers or one-hot"),
        ([[n, []] for n in NAMES], "whole numbers or one-hot"),
        ([[n, "cat"] for n in NAMES], "whole numbers or one-hot"),
        ([[n, 1.5] for n in NAMES], "whole numbers or one-hot"),
        ([[n, -1] for n in NAMES], "whole numbers or one-hot"),
        ([[n, True] for n in NAMES], "whole numbers or one-hot"),
        ([[n, 10**30] for n in NAMES], "a whole number of more than 64 bits"),
        ([[n, float("nan")] for n in NAMES], "whole numbers or one-hot"),
        ([[n, None] for n in NAMES], "whole numbers or one-hot"),
        ([[n] for n in NAMES], "whole numbers or one-hot"),
        ([[n, 1] for n in [*NAMES, NAMES[3]]], "labels 00000/img00000003.png twice"),
        ([[n, 1] for n in [*NAMES, "./" + NAMES[3]]], "labels 00000/img00000003.png twice"),
    ],
)
def test_labels_of_another_form_are_refused(labels, words, tmp_path):
    place = write_zip(tmp_path / "d.zip", with_labels(labels, some()))
    with pytest.raises(AccelkitError, match=words) as error:
        open_source(place)
    assert refused(error)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 50_000, b'{"a": 1, "a": 2}'])
def test_a_table_that_cannot_be_read_is_refused(content, tmp_path):
    place = write_folder(tmp_path, {**some(), "dataset.json": content})
    with pytest.raises(
        AccelkitError, match=r"cannot read .*dataset\.json .*or remove it$"
    ) as error:
        open_source(place)
    assert refused(error)


def test_a_data_set_within_a_folder_is_named(tmp_path):
    files = {f"{part}/{n}": c for part in "ab" for n, c in with_labels([], some()).items()}
    with pytest.raises(AccelkitError, match=r"name it as the data, as in .*/a$"):
        open_source(write_folder(tmp_path, files))


def test_other_labels_have_another_fingerprint(tmp_path):
    """Otherwise latents in the cache would keep the old labels."""
    names = list(some())
    tables = [[[n, label * i] for i, n in enumerate(names)] for label in (0, 1, 2)]
    places = [write_folder(tmp_path / str(i), with_labels(t, some())) for i, t in enumerate(tables)]
    places.append(write_folder(tmp_path / "none", with_labels(None, some())))
    assert len({open_source(place).fingerprint for place in places}) == 4
    again = write_zip(tmp_path / "again.zip", with_labels(tables[0][::-1], some()))
    assert open_source(again).fingerprint == open_source(places[0]).fingerprint
