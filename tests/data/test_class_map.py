"""Labels that a user sets by a class map, and the warnings where one is probably needed."""

import json
import re

import pytest
import torch
from picture_files import levels, png, refused, write_folder

from accelkit.data import open_source
from accelkit.data.latents import encode_latents
from accelkit.errors import AccelkitError, AccelkitWarning

PETS = {f"{name}/{i}.png": png(level) for level, name in enumerate(("ant", "bee", "cat"))
        for i in range(2)}  # fmt: skip


def numbered(count, first=0):
    return {f"{i}/0.png": png(i) for i in range(first, first + count)}


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets", PETS)


@pytest.fixture
def class_map(tmp_path):
    def write(content, name="map.json"):
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        return write_folder(tmp_path, {name: text}) / name

    return write


def test_it_sets_the_labels(pets, class_map):
    source = open_source(pets, class_map=class_map({"ant": 207, "bee": 3, "cat": 51}))
    assert source.labels.tolist() == [[207, 3, 51][level] for level in levels(source)]
    assert (source.classes, source.class_labels) == (("bee", "cat", "ant"), (3, 51, 207))
    assert source.names == {3: "bee", 51: "cat", 207: "ant"}
    assert source.summary() == f"6 images of {pets}, labels bee=3, cat=51, ant=207"


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_list_gives_the_number_of_the_line(pets, class_map, end):
    """As ImageNet's list of synsets: all of a model's classes, of which the data have some."""
    names = ["dog", "cat", "hot dog", "ant", "bee", "emu"]
    path = class_map((end or "\n").join(names) + end, "synsets.txt")
    source = open_source(pets, class_map=path)
    assert source.labels.tolist() == [names.index(("ant", "bee", "cat")[n]) for n in levels(source)]


def test_it_sets_the_labels_of_the_digits(class_map):
    turned = open_source("digits", class_map=class_map({str(i): 9 - i for i in range(10)}))
    plain = open_source("digits")
    assert turned.labels.tolist() == (9 - plain.labels).tolist()
    assert turned.classes == plain.classes[::-1]
    assert turned.fingerprint != plain.fingerprint


def test_it_sets_labels_that_a_table_has(tmp_path, class_map):
    rows = [{"file_name": f"{i}.png", "label": f"kind {i % 2}"} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {**{f"{i}.png": png(i) for i in range(4)}, "metadata.jsonl": lines}
    source = open_source(
        write_folder(tmp_path / "d", files), class_map=class_map({"kind 0": 9, "kind 1": 4})
    )
    assert source.labels.tolist() == [9, 4, 9, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"ant": 1, "bee": 2}, "no label for 1 of 3 classes of .*, e.g. cat"),
        ({"ant": 1, "bee": 2, "cat": 3, "dog": 4}, "names dog, which is not a class of"),
        ({"ant": 1, "bee": 2, "cat": 2}, "gives bee and cat the label 2"),
        ({"ant": 1, "bee": 2, "cat": -3}, "has -3 for cat"),
        ({"ant": 1, "bee": 2, "cat": 3.0}, "has 3.0 for cat"),
        ({"ant": 1, "bee": 2, "cat": "3"}, "has '3' for cat"),
        ({"ant": 1, "bee": 2, "cat": True}, "has True for cat"),
        ({"ant": 1, "bee": 2, "cat": None}, "has None for cat"),
        ({"ant": 1, "bee": 2, "cat": 10**20}, "holds a whole number of more than 64 bits"),
        ('{"ant": 1, "ant": 2, "bee": 3, "cat": 4}', "it names 'ant' twice"),
        (["ant", "bee", "cat"], "is not a JSON object such as"),
        ({}, "is not a JSON object such as"),
        ("{", "cannot read the class map"),
        (b"\xff\xff", "cannot read the class map"),
        ("[" * 50_000, "cannot read the class map"),
        ('{"ant": ' + "9" * 5_000 + "}", "holds a whole number of more than 64 bits"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(pets, class_map, content, words):
    with pytest.raises(AccelkitError, match=words) as error:
        open_source(pets, class_map=class_map(content))
    assert refused(error)


def test_a_folder_is_no_map(pets):
    with pytest.raises(AccelkitError, match=r"class map .*\(it is a folder, not a file\)") as error:
        open_source(pets, class_map=pets)
    assert refused(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("ant\nbee\n", "no label for 1 of 3 classes"),
        ("ant\n\nbee\ncat\n", "line 2 is empty"),
        ("ant\nbee\ncat\nbee\n", "it holds 'bee' twice"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(pets, class_map, content, words):
    with pytest.raises(AccelkitError, match=words) as error:
        open_source(pets, class_map=class_map(content, "names.txt"))
    assert refused(error)


def test_a_map_where_there_is_nothing_to_label(tmp_path, class_map):
    place = write_folder(tmp_path / "d", {"0.png": png(0)})
    with pytest.raises(AccelkitError, match=r"has no classes that the class map .* could label"):
        open_source(place, class_map=class_map({"ant": 0}))
    with pytest.raises(AccelkitError, match=r"cannot read the class map .*nowhere\.json"):
        open_source(place, class_map=tmp_path / "nowhere.json")


def test_latents_of_other_labels_are_others(pets, class_map, tmp_path):
    """The cache holds labels, and must not return those of another map."""
    labels = []
    for content in (None, {"ant": 7, "bee": 8, "cat": 9}, {"ant": 9, "bee": 8, "cat": 7}):
        source = open_source(pets, class_map=content and class_map(content))
        latents = encode_latents(source, None, size=8, cache_dir=tmp_path / "cache")
        assert torch.equal(latents.labels, torch.from_numpy(source.labels))
        labels.append(latents.labels.tolist())
    assert labels == [[0, 0, 1, 1, 2, 2], [7, 7, 8, 8, 9, 9], [9, 9, 8, 8, 7, 7]]


# Numbers as names


@pytest.mark.parametrize("files", [numbered(10), {f"{i:02d}/0.png": png(i) for i in range(12)}])
def test_numbers_that_are_their_labels(files, tmp_path):
    source = open_source(write_folder(tmp_path, files))
    assert source.labels.tolist() == levels(source)


@pytest.mark.parametrize(
    ("files", "words"),
    [(numbered(12), "10 has 2"), (numbered(9, 1), "1 has 0"), (numbered(2, 3), "3 has 0")],
)
def test_numbers_that_are_not_their_labels_warn(files, words, tmp_path, class_map):
    place = write_folder(tmp_path / "d", files)
    with pytest.warns(AccelkitWarning, match=f"classes of .* are numbers.* {words}; .*--class-map"):
        open_source(place)
    numbers = {name.split("/")[0]: int(name.split("/")[0]) for name in files}
    source = open_source(place, class_map=class_map(numbers))  # and none where they are said to be
    assert source.labels.tolist() == levels(source)


def test_numbers_below_zero_warn_too(tmp_path):
    with pytest.warns(AccelkitWarning, match="classes of .* are numbers.* -1 has 0; "):
        open_source(write_folder(tmp_path, numbered(3, -1)))


@pytest.mark.parametrize(
    "names", [("Cat", "cat"), ("Straße", "STRASSE"), ("caf\u00e9", "cafe\u0301")]
)
def test_names_that_are_hardly_two_warn(names, tmp_path):
    files = {f"{name}/0.png": png(level) for level, name in enumerate(names)}
    with pytest.warns(AccelkitWarning, match="are two classes"):
        open_source(write_folder(tmp_path, files))


def test_many_labels_are_one_line(tmp_path):
    files = {f"n{i:08d}/0.png": png(i % 256) for i in range(1000)}
    line = open_source(write_folder(tmp_path, files)).summary()
    assert len(line) < 400
    assert re.search(r"n00000000=0, n00000001=1, .*…, n00000999=999 \(1,000 classes\)$", line)
