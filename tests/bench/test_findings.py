"""What rows say beside each other: fronts, noise, fewer steps, combinations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import measured, one_row

from accelkit.bench.findings import Findings, grouped, label, verdict


def comparison(*rows, samplers=("ddim:50",)):
    results = one_row()
    first = results["rows"][0]
    results["rows"] = [
        {**first, "method": f"m{index}", "kind": "schedule", **row}
        for index, row in enumerate(rows)
    ]
    results["protocol"] = {**results["protocol"], "samplers": list(samplers)}
    return Findings(results)


figure = st.integers(1, 6).map(float)


@given(st.lists(st.tuples(figure, figure), min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats(points):
    held = comparison(*({"seconds": s, "fid": f} for s, f in points))
    left = set(points)
    for a in points:  # Pareto's definition: no worse in both, better in one
        left -= {b for b in points if a != b and a[0] <= b[0] and a[1] <= b[1]}
    assert {(row["seconds"], row["fid"]) for row in held.front("ddim")} == left
    for row in held.rows:
        assert held.on_front(row) == (held.beaten_by(row) is None)


def test_rows_without_a_figure_are_on_no_front():
    held = comparison({"seconds": 1.0}, {"fid": 1.0}, {"seconds": 2.0, "fid": 2.0})
    assert [row["method"] for row in held.front("ddim")] == ["m2"]


def test_a_front_goes_over_all_numbers_of_steps():
    rows = [{"seconds": 2.0, "fid": 2.0}, {"seconds": 1.0, "fid": 1.0, "steps": 25}]
    held = comparison(*rows, samplers=("ddim:50", "ddim:25"))
    assert held.samplers == ["ddim"]
    assert held.beaten_by(held.rows[0]) is held.rows[1]


def test_what_rows_share_is_no_noise_between_them():
    shared = np.random.default_rng(0).normal(0, 5, 10)
    a = {"images": 9, "fid": 10.0, "fid_jackknife": (10 + shared).tolist()}
    b = {"images": 9, "fid": 10.1, "fid_jackknife": (10.1 + shared).tolist()}
    assert verdict(a, b) == "lower"
    assert verdict(b, a) == "higher"


@pytest.mark.parametrize(("fid", "said"), [(2.0, "higher"), (0.5, "lower"), (1.0, "not dist")])
def test_without_a_jackknife_any_difference_counts(fid, said):
    a, b = {"fid": fid, "fid_jackknife": None}, {"fid": 1.0, "fid_jackknife": [1.0, 1.0]}
    assert verdict(a, b).startswith(said)


def test_fewer_steps_are_of_full_depth_and_take_about_the_time():
    steps = [
        {"method": "full", "kind": "full", "steps": n, "seconds": s, "fid": 3.0}
        for n, s in ((50, 10.0), (40, 8.0), (30, 6.0), (20, 4.0))
    ]
    cheap = {"seconds": 6.5, "fid": 2.0}
    held = comparison(*steps, cheap, {"seconds": 5.0, "fid": 2.0}, {"seconds": 9.9, "fid": 2.0})
    assert held.fewer_steps(held.rows[4])["steps"] == 30
    assert held.fewer_steps(held.rows[5]) is None  # 20% from either
    assert held.fewer_steps(held.rows[6]) is None  # near 50 steps, which are not fewer


def test_a_combination_has_the_parts_that_were_run_alone():
    held = Findings(measured())
    row = next(r for r in held.rows if r["method"] == "D4+pab" and r["steps"] == 50)
    parts = held.parts(row)
    assert [(r["method"], r["weights"], r["steps"]) for r in parts] == [
        ("D4", "original", 50),
        ("pab", "original", 50),
    ]
    assert held.parts({**row, "method": "D4+mag_cache"}) is None
    assert held.parts({**row, "weights": "tuned"}) is None  # pab was not run on tuned weights


def test_names_say_weights_and_settings():
    rows = [row for row in measured()["rows"] if row["method"] in ("D4", "steps", "full")]
    assert {label(row) for row in rows} == {"full depth", "D4", "D4 tuned"}
    assert label({"method": "steps", "weights": "original"}) == "full depth"
    tuned = [row for row in rows if label(row) == "D4 tuned"]
    assert grouped(tuned) == "D4 tuned (DDPM 250, DDIM 50 and DDIM 25)"
