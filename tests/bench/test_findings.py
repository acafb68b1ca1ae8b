"""What rows say beside each other: fronts, noise, fewer steps, combinations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import measured, one_row

from accelkit.bench.report.drawing import MARKERS, SIZES
from accelkit.bench.report.figures import saving, styles_of
from accelkit.bench.report.findings import Findings, group, grouped, label, verdict
from accelkit.bench.report.summary import standings, summary
from accelkit.bench.report.tables import papers, where_each_wins


def comparison(*rows, samplers=("ddim:50",)):
    results = one_row()
    first = results["rows"][0]
    results["rows"] = [
        {**first, "method": f"m{index}", "kind": "schedule", **row}
        for index, row in enumerate(rows)
    ]
    results["protocol"] = {**results["protocol"], "samplers": list(samplers)}
    return Findings(results)


def full(steps, seconds, **fields):
    fields = {"saving": 0.0, "saving_interval": [0.0, 0.0], "ideal_saving": 0.0, **fields}
    return {"method": "full", "kind": "full", "steps": steps, "seconds": seconds, **fields}


def fewer(steps, asked, saving, half=0.01, **fields):
    """Full depth in other steps as a benchmark has it."""
    row = {"method": f"steps:{steps}", "kind": "baseline", "steps": steps, "saving": saving}
    row |= {"saving_interval": [saving - half, saving + half], "ideal_saving": 1 - steps / asked}
    return {**row, **fields}


def said(held, *, rounds=20, of=summary):
    results = one_row()
    results["protocol"]["timing"]["rounds"] = rounds
    points = of(results, held) if of is summary else of(held)
    return " ".join(f"{about}: {text}" for about, text in points)


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


def test_the_same_images_by_slower_operators_are_behind():
    held = comparison(full(50, 1.0, fid=2.663892), {"method": "eager", "steps": 50, "seconds": 2.0,
                                                    "fid": 2.663890})  # fmt: skip
    assert [row["method"] for row in held.front("ddim")] == ["full"]
    assert verdict(held.rows[1], held.rows[0]) == "equal"


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


@pytest.mark.parametrize(("fid", "said"), [(2.0, "higher"), (0.5, "lower"), (1.0, "equal")])
def test_without_a_jackknife_any_difference_counts(fid, said):
    a, b = {"fid": fid, "fid_jackknife": None}, {"fid": 1.0, "fid_jackknife": [1.0, 1.0]}
    assert verdict(a, b) == said


def test_jackknives_of_different_numbers_of_images_tell_no_noise():
    noisy = [1.0, 9.0] * 5
    a = {"fid": 2.0, "fid_jackknife": noisy, "images": 100}
    b = {"fid": 2.1, "fid_jackknife": noisy[::-1], "images": 100}
    assert verdict(a, b) == "not distinguishable"
    assert verdict(a, {**b, "images": 1000}) == "lower"
    assert verdict(a, {**b, "fid_jackknife": noisy[:8]}) == "lower"


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


def test_fewer_steps_are_full_depth_in_group_colour_and_marker():
    rows = [full(50, 9.0), fewer(40, 50, 0.2), fewer(30, 50, 0.4), {"method": "pab"}]
    held = comparison(*[{"kind": "baseline", **row} for row in rows])
    assert [group(row) for row in held.rows] == ["full", "full", "full", "baseline"]
    styles = styles_of(held.rows)
    assert {name: (s.kind, s.marker) for name, s in styles.items()} == {
        "full depth": ("full", MARKERS[0]),
        "pab": ("baseline", MARKERS[1]),
    }
    assert label({"method": "steps:20+compile", "weights": "original"}) == "steps:20+compile"


def test_no_two_of_many_methods_look_the_same():
    held = comparison(*({} for _ in range(2 * len(MARKERS) + 3)))
    styles = styles_of(held.rows).values()
    looks = {(s.marker, s.size) for s in styles}
    assert len(looks) == len(styles) > len(MARKERS)
    assert {s.size for s in styles} == set(SIZES)


SAME_STEPS = [
    fewer(25, 50, 0.48, seconds=5.3, fid=3.0),
    full(50, 10.0, fid=2.0),
    full(25, 5.0, fid=3.0),
    {"method": "D4+steps:25", "kind": "combination", "steps": 25, "saving": 0.6, "seconds": 4.0},
    {"method": "D4", "steps": 25, "saving": 0.2, "seconds": 4.0, "fid": 4.0},
    {"method": "D4", "steps": 50, "saving": 0.2, "seconds": 8.0, "fid": 4.0},
]


def test_fewer_steps_are_not_the_full_depth_of_a_setting_with_as_many():
    held = comparison(*SAME_STEPS, samplers=("ddim:50", "ddim:25"))
    steps, of_50, of_25, both, cheap, _ = held.rows
    assert held.full("ddim", 25) is of_25
    assert held.base(steps) is of_50
    assert held.base(both) is of_50
    assert held.base(cheap) is held.base(of_25) is of_25
    assert held.parts(both) is None  # D4's saving is against 25 steps
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in _papers(held)}
    assert cells == {
        "full depth": ["2.00", "3.00"],
        "D4": ["4.00 (20.0%)", "4.00 (20.0%)"],
    }
    drawn = saving(held, styles_of(held.rows))
    assert [style.name for style in drawn.legend] == ["D4"]
    assert "combination" not in said(held, of=standings).lower()


def _papers(held):
    results = {**one_row(), "rows": held.rows}
    return papers(results, held).rows


def test_the_setting_of_fewer_steps_that_cannot_be_counted_is_the_next_above():
    held = comparison(
        full(50, 9.0), full(25, 5.0), fewer(20, 50, 0.4, ideal_saving=None),
        fewer(30, 50, 0.4, ideal_saving=None), fewer(25, 50, 0.4, ideal_saving=None),
        samplers=("ddim:50", "ddim:25"),
    )  # fmt: skip
    assert [held.base(row)["steps"] for row in held.rows[2:]] == [25, 50, 50]


def test_a_row_has_one_time_and_it_is_of_paired_rounds():
    held = comparison(
        full(50, 2.0, fid=2.0),
        fewer(43, 50, 0.19, seconds=1.442, fid=2.69, half=0.05),
        fewer(39, 50, 0.307, seconds=1.497, fid=2.73, half=0.05),  # slower by its own median
        {"saving": None, "seconds": 1.5, "fid": 9.0},
    )
    seconds = [held.seconds(row) * 50 for row in held.rows]
    assert seconds == pytest.approx([2.0, 1.62, 1.386, 1.5])
    assert held.on_front(held.rows[2])
    assert held.front("ddim") == [held.rows[2], held.rows[1], held.rows[0]]
    assert "saved of it, which is of paired rounds" in " ".join(where_each_wins(held).notes)


def test_what_times_do_not_tell_apart_is_not_behind():
    def of(half):
        rows = [full(50, 2.0, fid=2.0), fewer(40, 50, 0.2, fid=2.1, seconds=1.6, half=half)]
        rows.append({"saving": 0.19, "saving_interval": [0.18, 0.2], "seconds": 1.7, "fid": 3.0})
        held = comparison(*rows)
        cell = next(r for r in where_each_wins(held).rows if r[0].text == "m2")[1].text
        return held.place(held.rows[2]), cell, said(held, of=standings)

    place, cell, text = of(0.05)
    assert place == "timing noise"
    assert cell == "within the timing noise of full depth, 40 steps"
    assert "Schedules: Within the timing noise of it: m2 (DDIM 50)." in text
    assert of(0.0)[0] == "timing noise"  # they touch


def test_a_sure_lead_goes_before_a_better_one_within_the_noise():
    held = comparison(
        full(50, 2.0, fid=1.0),
        fewer(40, 50, 0.2, fid=2.0, seconds=1.6, half=0.05),
        fewer(30, 50, 0.4, fid=2.5, seconds=1.2),
        {"saving": 0.19, "saving_interval": [0.17, 0.21], "seconds": 1.6, "fid": 3.0},
    )
    assert held.beaten_by(held.rows[3]) is held.rows[2]
    assert held.place(held.rows[3]) == "behind"


def test_a_saving_that_may_be_none_saves_nothing():
    def of(low):
        row = {"saving": 0.05, "saving_interval": [low, 0.1], "seconds": 1.9, "fid": 2.0}
        return said(comparison(full(50, 2.0, fid=2.0), row))

    assert "m1 saves most" in of(0.01)
    assert "(95% interval 1.0% to 10.0%), at a FID of 2.00, equal to full depth's" in of(0.01)
    assert "Nothing saves time against full depth" in of(-0.01)


def test_few_rounds_give_a_range():
    results = one_row()
    results["protocol"]["timing"]["rounds"] = 5
    assert Findings(results).interval == "range"
    results["protocol"]["timing"]["rounds"] = 6
    assert Findings(results).interval == "95% interval"


def test_where_all_that_saves_loses_the_cheapest_loss_is_named():
    held = comparison(
        full(50, 1.913, fid=2.664),
        fewer(43, 50, 0.191, fid=2.689, seconds=1.4),
        fewer(31, 50, 0.405, fid=2.786, seconds=1.1),
        {"saving": 0.334, "saving_interval": [0.2, 0.4], "seconds": 1.3, "fid": 40.0},
    )
    text = said(held)
    assert "Nothing saves time against full depth without a distinguishable loss of FID." in text
    assert "31 steps save 40.5% (95% interval 39.5% to 41.5%) at FID 2.79 against 2.66" in text


def test_equal_images_are_not_too_few():
    same = {"fid": 2.0, "fid_jackknife": [1.9, 2.0, 2.1], "images": 9, "seconds": 1.0}
    near = {**same, "fid": 2.001, "fid_jackknife": [2.1, 2.0, 1.9]}
    results = {**one_row(), "rows": comparison(same, same, near).rows}
    results["protocol"]["extractor"] = {"dim": 2}
    text = dict(summary(results, Findings(results)))["Caution"]
    assert "to tell 2 of 3 pairs of methods apart" in text  # the equal pair is not among them


@pytest.mark.parametrize(("level", "means"), [(0.0, False), (0.25, False), (0.5, True)])
def test_figures_of_images_from_noise_that_is_taken_for_data(level, means):
    """One step of "leading" is at timestep 0, where the network is told there is no noise."""
    results = one_row()
    results["rows"][0] |= {"sampler": "ddim", "steps": 1, "fid": 300.0}
    results["protocol"] |= {"extractor": {"dim": 2}, "first_levels": {"ddim:1": level}}
    text = dict(summary(results, Findings(results))).get("Caution", "")
    assert ("the figures of DDIM 1 mean nothing" in text) is not means
    results["rows"][0]["fid"] = None
    assert "mean nothing" not in str(summary(results, Findings(results)))


def test_fewer_steps_beside_a_method_are_rather_no_faster():
    steps = [
        {"method": "full", "kind": "full", "steps": n, "seconds": s, "fid": 3.0}
        for n, s in ((50, 20.0), (40, 11.2), (30, 9.9))
    ]
    held = comparison(*steps, {"seconds": 10.0, "fid": 2.0}, {"seconds": 11.3, "fid": 2.0})
    assert held.fewer_steps(held.rows[3])["steps"] == 40
    assert held.fewer_steps(held.rows[4])["steps"] == 40  # the nearest, as none is slower
