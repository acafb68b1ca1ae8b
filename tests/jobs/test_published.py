"""The recipes of published tables: complete, readable, and figures as printed."""

import tomllib
from pathlib import Path

import pytest

from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError
from accelkit.jobs.fresh import ModelConfig
from accelkit.jobs.published import SCALES, names, publication, read_publication
from accelkit.jobs.published_costs import network_of
from accelkit.sample.samplers import SAMPLERS
from accelkit.schedule import Schedule
from accelkit.train.config import TrainConfig

# the tables, and how many figures of quality we know of each
TABLES = {
    "ase-table1": 5,
    "ase-table1-uvit": 5,
    "ase-table3": 20,
    "ase-table4": 21,
    "ase-table5": 25,
    "ase-table6": 25,
    "ase-table7": 25,
    "ase-table8": 20,
    "dvd-table1": 4,
    "dvd-table2": 4,
    "dvd-table3": 4,
    "dvd-table4": 5,
    "dvd-table5": 4,
    "dvd-table6": 7,
    "dvd-table-a1": 0,
    "dvd-table-a2": 0,
}
COSTS_ALONE = {"dvd-table-a1", "dvd-table-a2"}
COMPARISONS = [
    (name, scale)
    for name in TABLES
    for scale in SCALES
    if getattr(publication(name), scale) is not None
]


def test_every_table_has_its_recipe():
    assert set(names()) == set(TABLES)
    assert {name: len(publication(name).figures) for name in TABLES} == TABLES
    assert {n for n in TABLES if publication(n).full is None} == COSTS_ALONE


# typed in by hand: method, sampler, steps, fid, its deviation, share of time saved
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("ase-table1", ("D6", "ddpm", 250, 9.764, None, None)),
        ("ase-table1-uvit", ("full", "em", 1000, 4.858, None, None)),
        ("ase-table3", ("full", "ddim", 50, 9.114, 0.055, None)),
        ("ase-table3", ("D4", "ddpm", 250, 8.679, 0.070, 0.3046)),
        ("ase-table3", ("D6", "ddim", 200, 11.427, 0.190, 0.3725)),
        ("ase-table4", ("D5", "em", 1000, 4.746, 0.089, 0.3071)),
        ("ase-table4", ("D1", "dpm-fast", 25, 4.732, 0.076, 0.1216)),
        ("ase-table5", ("tome:0.2", "ddim", 50, 117.194, None, 0.0192)),
        ("ase-table5", ("tome:0.6:B2", "ddim", 50, 10.014, None, 0.0099)),
        ("ase-table6", ("tome:0.5:R10", "ddim", 50, 36.552, None, 0.0435)),
        ("ase-table7", ("tome:0.2:R5", "em", 1000, 13.508, None, -0.0571)),
        ("ase-table7", ("tome:0.6", "em", 1000, 419.851, None, 0.0691)),
        ("ase-table8", ("tome:0.6:R2", "dpm-fast", 25, 371.790, None, -0.0010)),
        ("dvd-table1", ("dvd-4p", "ddpm", 250, 48.20, None, None)),
        ("dvd-table2", ("full", "ddpm", 250, 43.47, None, None)),
        ("dvd-table3", ("dvd-2p", "ddpm", 250, 16.09, None, None)),
        ("dvd-table5", ("dvd-2p", "ddim", 50, 54.00, None, None)),
        ("dvd-table6", ("dvd-3p", "ddpm", 250, 34.76, None, None)),
    ],
)
def test_figures_are_those_printed(name, row):
    keys = ("method", "sampler", "steps", "fid", "fid_std", "saving")
    printed = [tuple(figure.get(key) for key in keys) for figure in publication(name).figures]
    assert printed.count(row) == 1


@pytest.mark.parametrize("name", sorted(set(TABLES) - COSTS_ALONE))
def test_figures_are_of_what_is_run(name):
    read = publication(name)
    samplers = {f"{figure['sampler']}:{figure['steps']}" for figure in read.figures}
    assert samplers == set(read.full.samplers)
    methods = {figure["method"] for figure in read.figures}
    assert methods <= set(read.full.methods)
    assert set(read.full.methods) - methods <= {"full"}
    assert {figure.get("variant") for figure in read.figures} - {None} == set(read.full.variants)


@pytest.mark.parametrize(("name", "scale"), COMPARISONS)
def test_settings_are_those_of_the_jobs(name, scale):
    read = publication(name)
    runs = getattr(read, scale)
    for variant in runs.variants.values() or [{}]:
        TrainConfig.from_dict({**runs.training, **variant})
    assert bool(runs.tuned) == bool(runs.training)
    backbone = backbone_of(network_of(read))
    depth, family = backbone.depth, backbone.family
    if runs.network:
        made = ModelConfig(**runs.network)
        depth, family = made.depth, made.family
        TrainConfig.from_dict(dict(runs.base))
    elif scale == "digits":
        depth, family = 28, "dit"
    assert family == backbone.family
    for method in runs.methods:
        Schedule.parse(method, depth, family)
    assert all(sampler.partition(":")[0] in SAMPLERS for sampler in runs.samplers)
    assert runs.methods[0] == "full"
    assert "full" not in runs.tuned
    small = scale == "digits"
    assert (runs.data == "digits") == small
    assert bool(runs.model or runs.network) == small


def test_rows_for_a_report():
    first, *_ = publication("ase-table3").published()
    assert first == {
        "source": "Moon et al. 2024, table 3",
        "method": "full",
        "sampler": "ddpm",
        "steps": 250,
        "fid": 9.171,
        "fid_std": 0.064,
        "saving": None,
        "setting": "DiT-XL/2, ImageNet 256, 5,000 images",
    }
    six = publication("dvd-table6")
    rows = {name: [r["fid"] for r in six.published(name)] for name in six.full.variants}
    assert rows["supervised"] == [43.47, 31.77, 31.56, 30.29]
    assert rows["unsupervised"] == [43.47, 35.63, 34.76, 34.62]
    guided = publication("dvd-table4").published()[3]
    assert guided["setting"].endswith("50,000 images, guided, 4,200,000 steps")
    assert guided["source"].endswith("up to 4,200,000 steps")  # not a number that nobody gave us


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ase-table2", "no reproduction is called 'ase-table2'; did you mean ase-table"),
        ("DVD-TABLE6", "did you mean dvd-table6"),
        ("x", "known are ase-table1, ase-table1-uvit, ase-table3"),
    ],
)
def test_names_nearby(name, words):
    with pytest.raises(AccelkitError, match=words):
        publication(name)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("images = 5000", "imags = 5000", r"unknown settings in \[full\]: imags"),
        ("images = 5000\n", "", "missing.*images"),
        ('tuned = ["D1",', 'tuned = ["D2",', "tuned methods that are not compared: D2"),
        (", fid = 9.171", "", "a row lacks fid"),
        ('title = "', 'titel = "', "titel"),
        ("setting = ", "sitting = ", r"unknown settings in \[figures\]: sitting"),
        ("[cost]\n", "[cost]\nx = 1\n", r"unknown settings in \[cost\]: x"),
        ('title = "', "title = ", "cannot read the publication"),
    ],
)
def test_what_is_no_publication(old, new, words, tmp_path):
    text = (Path(__file__).parents[2] / "recipes/published/ase-table3.toml").read_text()
    assert old in text
    path = tmp_path / "some.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(AccelkitError, match=words) as caught:
        read_publication(path)
    assert str(path) in str(caught.value)


def test_nothing_of_a_recipe_is_lost():
    for path in (Path(__file__).parents[2] / "recipes" / "published").glob("*.toml"):
        content, read = tomllib.loads(path.read_text()), publication(path.stem)
        assert list(read.figures) == content.get("figures", {}).get("rows", [])
        assert ("\n" + content["notes"]).count("\n- ") == len(read.notes)
        assert all(not note.startswith("-") and "\n" not in note for note in read.notes)
