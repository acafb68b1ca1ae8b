"""Depth partitions against the paper's tables, typed in by hand, and how they are asked for."""

import json

import pytest
from typer.testing import CliRunner

from accelkit.cli import app
from accelkit.compute import Compute
from accelkit.errors import AccelkitError
from accelkit.preset_names import is_preset
from accelkit.presets import dvd_partition
from accelkit.schedule import Schedule, check_readable

# parts: boundaries from noise to data, depths of 12 and of 28 blocks
TABLE = {
    2: ([1000, 500, 0], [6, 12], [14, 28]),
    3: ([1000, 750, 500, 0], [4, 8, 12], [8, 20, 28]),
    4: ([1000, 875, 750, 500, 0], [3, 5, 8, 12], [3, 13, 20, 28]),
}


@pytest.mark.parametrize("parts", TABLE)
@pytest.mark.parametrize("layers", [12, 28])
@pytest.mark.parametrize("family", ["dit", "uvit", "another"])
def test_every_timestep_runs_the_published_depth(parts, layers, family):
    bounds, *depths = TABLE[parts]
    schedule = Schedule.parse(f"dvd-{parts}p", layers, family)
    expected = [
        depth
        for depth, high, low in zip(depths[layers == 28], bounds, bounds[1:], strict=False)
        for _ in range(low, high)
    ][::-1]
    assert [schedule.depth_at(i / 1000) for i in range(1000)] == expected
    assert schedule.depth_at(1.0) == expected[-1]
    assert schedule.name == f"dvd-{parts}p"


@pytest.mark.parametrize("parts", TABLE)
@pytest.mark.parametrize("layers", [8, 10, 12, 16, 24, 28, 56])
def test_three_quarters_of_an_even_depth_on_average(parts, layers):
    schedule = Schedule.parse(f"dvd-{parts}p", layers)
    assert schedule.mean_depth() == pytest.approx(0.75 * layers)


@pytest.mark.parametrize("parts", TABLE)
def test_any_depth_that_halving_can_tell_apart(parts):
    for layers in range(2 ** (parts - 1), 130):
        depths = [c.depth for c in Schedule.parse(f"dvd-{parts}p", layers).computes]
        assert depths == sorted(set(depths), reverse=True)
        assert len(depths) == parts
        assert (depths[0], depths[-1] >= 1) == (layers, True)


@pytest.mark.parametrize(
    ("layers", "parts", "depths"),
    [(2, 2, [2, 1]), (4, 3, [4, 3, 1]), (8, 4, [8, 5, 4, 2]), (9, 2, [9, 5]), (9, 3, [9, 6, 4])],
)
def test_small_and_odd_depths(layers, parts, depths):
    assert [c.depth for c in dvd_partition(parts, layers).computes] == depths


@pytest.mark.parametrize(
    ("name", "layers", "instead"),
    [("dvd-4p", 7, "use dvd-3p, or"), ("dvd-3p", 3, "use dvd-2p, or"), ("dvd-2p", 1, "; give")],
)
def test_too_few_blocks(name, layers, instead):
    least = layers + 1
    with pytest.raises(AccelkitError, match=rf"{name} needs at least {least} blocks") as caught:
        Schedule.parse(name, layers)
    assert f"count {layers}" in str(caught.value)
    assert instead in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "edges", "depths"),
    [
        ("dvd-2p:threshold=0.6", (0.6, 1), [12, 6]),
        ("dvd-2p:depth=10", (0.5, 1), [12, 10]),
        ("dvd-2p:threshold=0.6,depth=10", (0.6, 1), [12, 10]),
        ("DVD-2P: depth=3, threshold=.25", (0.25, 1), [12, 3]),
        ("dvd-3p:threshold=0.6", (0.6, 0.8, 1), [12, 8, 4]),
        ("dvd-4p:threshold=0.2", (0.2, 0.6, 0.8, 1), [12, 8, 5, 3]),
        ("dvd-3p:depth=8", (0.5, 0.75, 1), [12, 9, 7]),  # delta (12 - 8) / 2 - 1
    ],
)
def test_options_of_the_ablation(text, edges, depths):
    schedule = Schedule.parse(text, 12)
    assert schedule.edges == pytest.approx(edges)
    assert [c.depth for c in schedule.computes] == depths
    assert Schedule.parse(schedule.name, 12) == schedule
    assert schedule.name.startswith(f"{text[:6].lower()}:")


def test_names_keep_a_threshold_exactly():
    schedule = dvd_partition(2, 12, 1 / 3)
    assert Schedule.parse(schedule.name, 12) == schedule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dvd-2p:threshold=0", "is between 0 and 1, got 0"),
        ("dvd-2p:threshold=1", "is between 0 and 1, got 1"),
        ("dvd-2p:threshold=nan", "is between 0 and 1, got nan"),
        ("dvd-2p:threshold=half", "takes threshold=.*and depth=.*got 'threshold=half'"),
        ("dvd-2p:depth=2.5", "got 'depth=2.5'"),
        ("dvd-2p:depth=0", "is between 1 and 11.*got 0"),
        ("dvd-2p:depth=12", "is between 1 and 11.*got 12"),
        ("dvd-2p:first=3", "got 'first=3'"),
        ("dvd-2p:0.6", "got '0.6'"),
        ("dvd-3p:depth=2", "would give -2, 6, 12 of 12 blocks"),
        ("dvd-3p:depth=11", "would give 10, 12, 12 of 12 blocks"),
        ("dvd-5p", "unknown schedule 'dvd-5p'.*nearest first: dvd-"),
    ],
)
def test_options_that_make_no_partition(text, said):
    with pytest.raises(AccelkitError, match=said) as caught:
        Schedule.parse(text, 12)
    assert "\n" not in str(caught.value)


def test_one_part_is_no_partition():
    with pytest.raises(AccelkitError, match="at least 2 parts, got 1"):
        dvd_partition(1, 12)


def test_it_composes_with_merging():
    schedule = Schedule.parse("dvd-2p:depth=4+tome:0.3", 12)
    assert str(schedule) == "12+tome:0.3@0.5,4+tome:0.3@1"


def test_an_option_given_twice_is_refused():
    with pytest.raises(AccelkitError, match="given threshold twice"):
        Schedule.parse("dvd-2p:threshold=0.3,threshold=0.4", 12)


@pytest.mark.parametrize(
    "text", ["0@0.5,1@1", "uniform:0", "99@1", "full", "D2", "dvd-4p:depth=3", "full+tome:0.5"]
)
def test_what_some_family_reads_is_let_through(text):
    check_readable(text)


@pytest.mark.parametrize("family", ["", "uvit", "hunyuan", "unet"])
def test_files_of_every_family_are_let_through(family, tmp_path):
    schedule = Schedule((0.5, 1.0), (Compute(4), Compute(2)), 4, "own", family)
    (tmp_path / "own.json").write_text(json.dumps(schedule.to_dict()))
    check_readable(str(tmp_path / "own.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("D9", "^unknown schedule 'D9'; known, nearest first: D1"),
        ("8@0.5,-1@1", "0 or more, got -1"),
        ("gone.json", "no schedule file"),
        ("D2+tome:2", "a merge ratio"),
    ],
)
def test_what_no_family_reads_is_refused(text, words):
    with pytest.raises(AccelkitError, match=words):
        check_readable(text)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("dvd-4p", True),
        ("DvD-2p:depth=3+tome:0.3", True),
        ("D2", True),  # of U-ViT
        ("D7", False),
        ("uniform:3", False),
        ("12@0.5,6@1", False),
    ],
)
def test_what_is_known_as_a_preset(text, known):
    assert is_preset(text) is known


@pytest.mark.parametrize("command", ["finetune", "train"])
@pytest.mark.parametrize(
    ("arguments", "weight"),
    [
        (("--schedule", "dvd-3p:depth=13"), 1.0),
        (("--schedule", "D4"), 0.0),
        (("--schedule", "dvd-4p", "--intermediate-weight", "0"), 0.0),
        (("--schedule", "D4", "--intermediate-weight", "0.5"), 0.5),
    ],
)
def test_parts_of_dvd_are_supervised_unless_told_otherwise(command, arguments, weight):
    done = CliRunner().invoke(app, [command, *arguments, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    settings = json.loads(done.stdout)
    assert settings["intermediate_weight"] == weight
    assert settings["intermediate_match"] == "nearest"
