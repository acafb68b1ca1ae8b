"""The published schedules against the table they come from, typed in by hand."""

import pytest

from accelkit.errors import AccelkitError
from accelkit.preset_names import preset_names
from accelkit.schedule import Schedule

# blocks run in ten bins of 0.1, data to noise; mean depth; ideal saving in percent
TABLE = {
    "D1": ([28, 28, 26, 26, 24, 24, 22, 22, 20, 20], 24.0, 14.3),
    "D3": ([28, 28, 25, 25, 22, 22, 19, 19, 16, 16], 22.0, 21.4),
    "D4": ([28, 28, 24, 24, 20, 20, 16, 16, 12, 12], 20.0, 28.6),
    "D6": ([28, 28, 24, 22, 20, 18, 12, 10, 8, 6], 17.6, 37.1),
}


def test_no_other_schedule_is_published_for_dit():
    assert preset_names("dit") == tuple(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_every_timestep_runs_the_published_depth(name):
    bins, mean, saving = TABLE[name]
    schedule = Schedule.parse(name)
    assert [schedule.depth_at(i / 1000) for i in range(1000)] == [
        bins[i // 100] for i in range(1000)
    ]
    assert schedule.depth_at(1.0) == bins[-1]
    assert schedule.mean_depth() == pytest.approx(mean, abs=1e-9)
    assert schedule.mean_depth(range(1000)) == pytest.approx(mean, abs=1e-9)
    assert round(100 * schedule.ideal_saving(), 1) == saving
    assert (schedule.layers, schedule.name) == (28, name)


def test_d6_stands_on_bins_of_a_tenth():
    # 28 fills the first two, 0 to 0.2
    assert Schedule.parse("D6").edges == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@pytest.mark.parametrize(
    ("name", "depth", "expected"),
    [
        ("D4", 12, [12, 10, 9, 7, 5]),  # 12/28 of 28, 24, 20, 16, 12: 12, 10.3, 8.6, 6.9, 5.1
        ("D4", 7, [7, 6, 5, 4, 3]),
        ("D3", 14, [14, 13, 11, 10, 8]),  # 12.5 and 9.5 go up
        ("D1", 56, [56, 52, 48, 44, 40]),
        ("D4", 1, [1]),
        ("D6", 2, [2, 1]),  # 18/14 goes down to 1, and 6/14 may not go down to 0
    ],
)
def test_other_depths_keep_the_fraction_halves_up_and_at_least_one(name, depth, expected):
    schedule = Schedule.parse(name, depth)
    assert [compute.depth for compute in schedule.computes] == expected
    assert schedule.layers == depth


@pytest.mark.parametrize("name", ["D2", "D5"])
def test_there_is_no_such_row_for_dit(name):
    with pytest.raises(AccelkitError, match=rf"unknown schedule '{name}'.*first: .*D[1346]"):
        Schedule.parse(name)
