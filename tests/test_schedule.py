"""Schedules: reading, refusing, writing and integrating them."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelkit import preset_names
from accelkit.errors import AccelkitError
from accelkit.preset_names import register_presets
from accelkit.schedule import Compute, Schedule

LITERAL = "28@0.2,24@0.4,20@0.6,16@0.8,12@1"

quick = settings(deadline=None, max_examples=80, database=None)


@st.composite
def rows(draw):
    """Rising edges that end at 1, with depths of at most 9 blocks."""
    inner = draw(st.sets(st.integers(1, 999), max_size=7))
    edges = [i / 1000 for i in sorted(inner)] + [1.0]
    depths = draw(st.lists(st.integers(1, 9), min_size=len(edges), max_size=len(edges)))
    return edges, depths


def made(edges, depths, layers=9):
    return Schedule(tuple(edges), tuple(Compute(d) for d in depths), layers)


def scan(edges, depths, t):
    """The definition, read slowly: [0, e1), [e1, e2), ..., the last one closed."""
    for low, high, depth in zip([0.0, *edges], edges, depths, strict=False):
        if low <= t < high:
            return depth
    assert t == 1
    return depths[-1]


@quick
@given(rows(), st.lists(st.floats(0, 1), max_size=20))
def test_depth_at_is_the_interval_found_by_scanning(given_rows, points):
    edges, depths = given_rows
    schedule = made(edges, depths)
    around = [math.nextafter(e, side) for e in edges[:-1] for side in (0, 1)]
    for t in [0.0, 1.0, *edges, *around, *points]:
        assert schedule.depth_at(t) == scan(edges, depths, t)


@quick
@given(rows())
def test_mean_depth_is_the_integral(given_rows):
    edges, depths = given_rows
    middles = (np.arange(1000) + 0.5) / 1000  # exact: every edge is a multiple of 1/1000
    riemann = np.mean([scan(edges, depths, t) for t in middles])
    assert made(edges, depths).mean_depth() == pytest.approx(riemann, abs=1e-9)
    assert made(edges, depths).ideal_saving() == pytest.approx(1 - riemann / 9, abs=1e-9)


@quick
@given(rows())
def test_equal_neighbours_are_one_interval(given_rows):
    edges, depths = given_rows
    schedule = made(edges, depths)
    assert all(a != b for a, b in zip(schedule.computes, schedule.computes[1:], strict=False))
    split = sorted({*edges, *(i / 16 for i in range(1, 17))})
    same = made(split, [scan(edges, depths, math.nextafter(e, 0)) for e in split])
    assert same == schedule
    assert hash(same) == hash(schedule)
    assert schedule.depths == tuple(sorted(set(depths)))


@quick
@given(rows())
def test_text_and_data_round_trip(given_rows):
    schedule = made(*given_rows)
    assert Schedule.parse(str(schedule), 9) == schedule
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule


def test_last_edge_belongs_to_the_last_interval_and_inner_ones_to_the_next():
    schedule = Schedule.parse("6@0.5,2@1", 6)
    assert [schedule.depth_at(t) for t in (0, 0.4999, 0.5, 1)] == [6, 6, 2, 2]


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, math.nan, math.inf, 500])
def test_levels_outside_the_axis_are_refused(t):
    with pytest.raises(AccelkitError, match="between 0"):
        Schedule.parse("D4").depth_at(t)


def test_literal_reads_absolute_depths():
    schedule = Schedule.parse(LITERAL)
    assert schedule == Schedule.parse("D4")
    assert Schedule.parse(" 28 @ 0.2, 24@0.4 ,20@0.6,16@0.8,12@1.0 ") == schedule
    assert Schedule.parse("6@0.5,2@1", 12) == made([0.5, 1.0], [6, 2], 12)


def test_names_take_no_part_in_equality_and_layers_do():
    assert Schedule.uniform(6, 12) != Schedule.uniform(6, 13)
    assert Schedule.uniform(6, 12, "a") == Schedule.uniform(6, 12, "b")


@pytest.mark.parametrize("text", ["full", "FULL", " Full "])
def test_full_runs_every_block(text):
    schedule = Schedule.parse(text, 17)
    assert schedule == made([1.0], [17], 17)
    assert schedule.ideal_saving() == 0


@pytest.mark.parametrize("text", ["uniform:7", "Uniform:7", "UNIFORM:7"])
def test_uniform_runs_as_many_everywhere(text):
    assert Schedule.parse(text, 12) == made([1.0], [7], 12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("28@0.4,24@0.2,12@1", "must rise"),
        ("28@0.4,24@0.4,12@1", "must rise"),
        ("28@0,12@1", "must rise from above 0"),
        ("28@-0.5,12@1", "must rise from above 0"),
        ("28@0.2,12@0.9", "must be 1"),
        ("28@0.2,12@1.1", "must be 1"),
        ("0@1", "runs no block"),
        ("-3@1", "0 or more, got -3"),
        ("29@1", "above the model's 28 blocks"),
        ("28@nan", "cannot read"),
        ("28@nan,12@1", "cannot read"),
        ("28@inf", "cannot read"),
        ("28@half,12@1", "cannot read"),
        ("many@1", "cannot read"),
        ("2.5@1", "cannot read"),
        ("28@", "cannot read"),
        ("@1", "cannot read"),
        ("28@0.5,,12@1", "cannot read"),
        ("28@0.5,12@1,", "cannot read"),
        ("28@0.5;12@1", "cannot read"),
        ("28@0.5,12", "cannot read"),
        ("uniform:0", "runs no block"),
        ("uniform:-2", "0 or more, got -2"),
        ("uniform:29", "above the model's 28 blocks"),
        ("uniform:2.5", "unknown schedule"),
        ("", "unknown schedule"),
    ],
)
def test_malformed_text_says_what_is_wrong(text, says):
    with pytest.raises(AccelkitError, match=says) as raised:
        Schedule.parse(text)
    assert "\n" not in str(raised.value)


def test_unknown_name_lists_the_known_nearest_first():
    with pytest.raises(AccelkitError, match=r"nearest first: uniform:K, ") as raised:
        Schedule.parse("uniform")
    assert all(name in str(raised.value) for name in ("D1", "D3", "D4", "D6", "full"))
    with pytest.raises(AccelkitError, match=r"nearest first: full, "):
        Schedule.parse("ful")


def test_presets_are_found_by_family_whatever_the_case():
    register_presets(
        "test-family",
        {"Halves": lambda depth: Schedule.parse(f"{depth}@0.5,{depth // 2}@1", depth)},
    )
    assert Schedule.parse("hALVES", 4, "test-family") == made([0.5, 1.0], [4, 2], 4)
    assert Schedule.parse("d4") == Schedule.parse("D4")
    with pytest.raises(AccelkitError, match="test-family family; known, nearest first: Halves"):
        Schedule.parse("halve", 4, "test-family")
    assert Schedule.parse("D4", 28, "no-family") == Schedule.parse("D4", 28)


def test_presets_for_all_families_are_found_whatever_the_case(monkeypatch):
    monkeypatch.setattr(preset_names, "_everywhere", {})
    preset_names.register_for_all(
        {"Ends": lambda depth, options: Schedule.parse(f"{depth}@0.5,{options}@1", depth)}
    )
    for family in ("dit", "uvit"):
        assert Schedule.parse("eNDS:2", 4, family).depths == (2, 4)


@pytest.mark.parametrize("depth", [0, -1, 2.0, "28", True, None])
def test_model_depth_is_a_number_of_blocks(depth):
    with pytest.raises(AccelkitError, match="number of blocks"):
        Schedule.parse("full", depth)


@pytest.mark.parametrize("depth", [2.0, "3", True, None])
def test_compute_takes_whole_numbers_only(depth):
    with pytest.raises(TypeError, match="whole number"):
        Compute(depth)


def test_intervals_and_edges_have_to_match():
    for edges, computes in (((), ()), ((1.0,), ()), ((0.5, 1.0), (Compute(1),))):
        with pytest.raises(AccelkitError, match="one upper edge per interval"):
            Schedule(edges, computes, 3)
    with pytest.raises(AccelkitError, match="must rise"):
        Schedule((math.nan, 1.0), (Compute(2), Compute(1)), 3)


TOML = """
name = "mine"
layers = 12
[[intervals]]
until = 0.25
depth = 12
[[intervals]]
until = 1
depth = 5
"""


def test_files_round_trip_and_scale(tmp_path):
    (tmp_path / "mine.toml").write_text(TOML)
    schedule = Schedule.parse(tmp_path / "mine.toml", 12)
    assert schedule == made([0.25, 1.0], [12, 5], 12)
    assert schedule.name == "mine"
    (tmp_path / "mine.JSON").write_text(json.dumps(schedule.to_dict()))
    again = Schedule.parse(str(tmp_path / "mine.JSON"), 12)
    assert (again, again.name) == (schedule, "mine")
    assert Schedule.parse(tmp_path / "mine.toml", 24) == made([0.25, 1.0], [24, 10], 24)


INTERVALS = [{"until": 1, "depth": 2}]
BAD_FILES = {
    "not.json": "{",
    "not.toml": "layers = ",
    "list.json": "[]",
    "empty.json": "{}",
    "text.json": '"D4"',
    "binary.json": b"\xff\xfe\x00",
    "unknown_key.json": json.dumps({"layers": 4, "intervals": INTERVALS, "lambda": 1}),
    "no_layers.json": json.dumps({"intervals": INTERVALS}),
    "no_intervals.json": json.dumps({"layers": 4, "intervals": []}),
    "null_intervals.json": json.dumps({"layers": 4, "intervals": None}),
    "text_interval.json": json.dumps({"layers": 4, "intervals": ["ab"]}),
    "no_until.json": json.dumps({"layers": 4, "intervals": [{"depth": 2}]}),
    "no_depth.json": json.dumps({"layers": 4, "intervals": [{"until": 1}]}),
    "text_until.json": json.dumps({"layers": 4, "intervals": [{"until": "x", "depth": 2}]}),
    "half_depth.json": json.dumps({"layers": 4, "intervals": [{"until": 1, "depth": 2.5}]}),
    "knob.json": json.dumps({"layers": 4, "intervals": [{"until": 1, "depth": 2, "x": 1}]}),
    "too_deep.json": json.dumps({"layers": 1, "intervals": INTERVALS}),
    "short.json": json.dumps({"layers": 4, "intervals": [{"until": 0.5, "depth": 2}]}),
    "text_layers.json": json.dumps({"layers": "x", "intervals": INTERVALS}),
    "half_layers.json": json.dumps({"layers": 4.7, "intervals": INTERVALS}),
    "true_layers.json": json.dumps(
        {"layers": True, "intervals": [{"until": 1, "depth": 1}]},
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name(tmp_path, name):
    content = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AccelkitError, match=name):
        Schedule.parse(path, 4)


@pytest.mark.parametrize("name", [n for n, c in BAD_FILES.items() if c[:2] in ("{}", '{"')])
def test_bad_data_is_refused_without_a_file(name):
    with pytest.raises(AccelkitError):
        Schedule.from_dict(json.loads(BAD_FILES[name]))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(AccelkitError, match=r"no schedule file at .*absent\.toml"):
        Schedule.parse(tmp_path / "absent.toml")


def test_mean_depth_takes_levels_timesteps_and_tensors():
    schedule = Schedule.parse("6@0.5,2@1", 6)  # timestep 500 is on the edge: depth 2
    assert schedule.mean_depth([0.1, 0.2, 0.9]) == pytest.approx(14 / 3)
    assert schedule.mean_depth([0, 499, 500, 999]) == 4
    for steps in (torch.tensor([0, 499, 999]), np.array([0, 499, 999]), (0, 499, 999)):
        assert schedule.mean_depth(steps) == pytest.approx(14 / 3)
    assert schedule.mean_depth(torch.tensor([0.25, 0.75])) == 4
    assert schedule.mean_depth(t / 10 for t in range(10)) == 4
    assert schedule.mean_depth([0, 1]) == 4  # levels: none is above 1
    assert schedule.ideal_saving([999]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("steps", [[], [0.5, 1.5], [1001], [-1, 500], [math.nan]])
def test_mean_depth_refuses_what_lies_nowhere(steps):
    with pytest.raises(AccelkitError):
        Schedule.parse("D4").mean_depth(steps)
