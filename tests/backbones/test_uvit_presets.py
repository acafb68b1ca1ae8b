"""The presets of U-ViT, and schedules of other families."""

import json

import pytest
from plain import enable
from test_uvit import make

from accelkit.errors import AccelkitError
from accelkit.preset_names import preset_names
from accelkit.runtime.switch import enabled_on
from accelkit.schedule import Schedule


@pytest.fixture
def uvit():
    return make()


# decoder blocks run in five bins of 0.2, data to noise
TABLE = {
    "D1": [6, 5, 4, 3, 2],
    "D2": [6, 5, 3, 2, 1],
    "D3": [6, 4, 3, 2, 1],
    "D4": [5, 4, 2, 2, 1],
    "D5": [5, 4, 2, 1, 1],
    "D6": [5, 3, 2, 1, 1],
}


@pytest.mark.parametrize("name", TABLE)
def test_every_timestep_runs_the_published_depth(name):
    schedule = Schedule.parse(name, 6, "uvit")
    assert [schedule.depth_at(i / 1000) for i in range(1000)] == [
        TABLE[name][i // 200] for i in range(1000)
    ]
    assert schedule.mean_depth() == pytest.approx(sum(TABLE[name]) / 5)
    assert (schedule.layers, schedule.family, schedule.name) == (6, "uvit", name)


def test_presets_scale_by_the_fraction_of_six():
    assert set(TABLE) <= set(preset_names("uvit"))
    m = Schedule.parse("D1", 8, "uvit")  # ImageNet-64 M: 8, 6.67, 5.33, 4, 2.67
    assert [c.depth for c in m.computes] == [8, 7, 5, 4, 3]
    h = Schedule.parse("D6", 14, "uvit")  # 11.67, 7, 4.67, 2.33, 2.33
    assert [c.depth for c in h.computes] == [12, 7, 5, 2]
    with enable(make(12), "D6") as state:
        assert [c.depth for c in state.schedule.computes] == [5, 3, 2, 1]


def test_schedules_of_other_families_or_depths(uvit, dit):
    with pytest.raises(AccelkitError, match="above the model's 4 blocks"):
        enable(uvit, "5@1")
    with pytest.raises(AccelkitError, match="counts blocks as the uvit family does, this is a dit"):
        enable(dit, Schedule.parse("D4", 6, "uvit"))
    with pytest.raises(AccelkitError, match="counts blocks as the dit family does, this is a uvit"):
        enable(uvit, Schedule.parse("D4", 4))
    assert enabled_on(uvit) is None
    enable(uvit, Schedule.parse("full", 4))


def test_a_file_of_another_family(uvit, dit, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(Schedule.parse("D4", 4, "uvit").to_dict()))
    with pytest.raises(AccelkitError, match="counts blocks of the uvit family, this is a dit"):
        enable(dit, path)
    assert enabled_on(dit) is None
    assert enable(uvit, path).schedule == Schedule.parse("D4", 4, "uvit")
