"""How rows compare: fronts, noise, full depth of equal time and of equal quality."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import measured, one_row

from accelkit.bench.report.drawing import MARKERS, SIZES
from accelkit.bench.report.figures import saving, styles_of
from accelkit.bench.report.findings import Findings, group, grouped, label, verdict
from accelkit.bench.report.tables import against_full_depth, overview
from accelkit.bench.report.text import summary


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


def said(findings):
    return " ".join(f"{about}: {text}" for about, text in summary(one_row(), findings))


figure = st.integers(1, 6).map(float)


@given(st.lists(st.tuples(figure, figure), min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats(points):
    findings = comparison(*({"seconds": s, "fid": f} for s, f in points))
    left = set(points)
    for a in points:  # Pareto's definition: no worse in both, better in one
        left -= {b for b in points if a != b and a[0] <= b[0] and a[1] <= b[1]}
    assert {(row["seconds"], row["fid"]) for row in findings.front("ddim")} == left
    for row in findings.rows:
        assert findings.on_front(row) == ((row["seconds"], row["fid"]) in left)


def test_the_same_images_by_slower_operators_are_behind():
    eager = {"method": "eager", "steps": 50, "seconds": 2.0, "fid": 2.663890}
    findings = comparison(full(50, 1.0, fid=2.663892), eager)
    assert [row["method"] for row in findings.front("ddim")] == ["full"]
    assert verdict(findings.rows[1], findings.rows[0]) == "equal"


def test_rows_without_a_figure_are_on_no_front():
    findings = comparison({"seconds": 1.0}, {"fid": 1.0}, {"seconds": 2.0, "fid": 2.0})
    assert [row["method"] for row in findings.front("ddim")] == ["m2"]


def test_a_front_goes_over_all_numbers_of_steps():
    rows = [{"seconds": 2.0, "fid": 2.0}, {"seconds": 1.0, "fid": 1.0, "steps": 25}]
    findings = comparison(*rows, samplers=("ddim:50", "ddim:25"))
    assert findings.samplers == ["ddim"]
    assert findings.front("ddim") == [findings.rows[1]]


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
    findings = comparison(*steps, cheap, {"seconds": 5.0, "fid": 2.0}, {"seconds": 9.9, "fid": 2.0})
    assert findings.same_time(findings.rows[4])["steps"] == 30
    assert findings.same_time(findings.rows[5]) is None  # 20% from either
    assert findings.same_time(findings.rows[6]) is None  # near 50 steps, which are not fewer


def test_names_say_weights_and_settings():
    rows = [row for row in measured()["rows"] if row["method"] in ("D4", "steps", "full")]
    assert {label(row) for row in rows} == {"full depth", "D4", "D4 tuned"}
    assert label({"method": "steps", "weights": "original"}) == "full depth"
    tuned = [row for row in rows if label(row) == "D4 tuned"]
    assert grouped(tuned) == "D4 tuned (DDPM 250, DDIM 50 and DDIM 25)"


def test_fewer_steps_are_full_depth_in_group_colour_and_marker():
    rows = [full(50, 9.0), fewer(40, 50, 0.2), fewer(30, 50, 0.4), {"method": "pab"}]
    findings = comparison(*[{"kind": "baseline", **row} for row in rows])
    assert [group(row) for row in findings.rows] == ["full", "full", "full", "baseline"]
    styles = styles_of(findings.rows)
    assert {name: (s.kind, s.marker) for name, s in styles.items()} == {
        "full depth": ("full", MARKERS[0]),
        "pab": ("baseline", MARKERS[1]),
    }
    assert label({"method": "steps:20+compile", "weights": "original"}) == "steps:20+compile"


def test_no_two_of_many_methods_look_the_same():
    findings = comparison(*({} for _ in range(2 * len(MARKERS) + 3)))
    styles = styles_of(findings.rows).values()
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
    findings = comparison(*SAME_STEPS, samplers=("ddim:50", "ddim:25"))
    steps, of_50, of_25, both, cheap, _ = findings.rows
    assert findings.full("ddim", 25) is of_25
    assert findings.base(steps) is of_50
    assert findings.base(both) is of_50
    assert findings.base(cheap) is findings.base(of_25) is of_25
    cells = {
        row[0].text: [cell.text for cell in row[1:]]
        for row in overview({**one_row(), "rows": findings.rows}, findings).rows
    }
    assert cells == {
        "full depth": ["2.00", "3.00"],
        "D4": ["4.00 (20.0%)", "4.00 (20.0%)"],
    }
    drawn = saving(findings, styles_of(findings.rows))
    assert [style.name for style in drawn.legend] == ["D4"]


def test_the_setting_of_fewer_steps_that_cannot_be_counted_is_the_next_above():
    findings = comparison(
        full(50, 9.0), full(25, 5.0), fewer(20, 50, 0.4, ideal_saving=None),
        fewer(30, 50, 0.4, ideal_saving=None), fewer(25, 50, 0.4, ideal_saving=None),
        samplers=("ddim:50", "ddim:25"),
    )  # fmt: skip
    assert [findings.base(row)["steps"] for row in findings.rows[2:]] == [25, 50, 50]


def test_a_row_has_one_time_and_it_is_of_paired_rounds():
    findings = comparison(
        full(50, 2.0, fid=2.0),
        fewer(43, 50, 0.19, seconds=1.442, fid=2.69, half=0.05),
        fewer(39, 50, 0.307, seconds=1.497, fid=2.73, half=0.05),  # slower by its own median
        {"saving": None, "seconds": 1.5, "fid": 9.0},
    )
    seconds = [findings.seconds(row) * 50 for row in findings.rows]
    assert seconds == pytest.approx([2.0, 1.62, 1.386, 1.5])
    assert findings.on_front(findings.rows[2])
    assert findings.front("ddim") == [findings.rows[2], findings.rows[1], findings.rows[0]]
    assert "comes from paired rounds" in " ".join(against_full_depth(findings).notes)


def test_a_saving_that_may_be_none_saves_nothing():
    def of(low):
        row = {"saving": 0.05, "saving_interval": [low, 0.1], "seconds": 1.9, "fid": 2.0}
        return said(comparison(full(50, 2.0, fid=2.0), row))

    assert "m1 saves the most time" in of(0.01)
    assert "(95% interval 1.0% to 10.0%). Its FID of 2.00 is equal to full depth's" in of(0.01)
    assert "Nothing saves time without a distinguishable loss of FID" in of(-0.01)


def test_few_rounds_give_a_range():
    results = one_row()
    results["protocol"]["timing"]["rounds"] = 5
    assert Findings(results).interval == "range"
    results["protocol"]["timing"]["rounds"] = 6
    assert Findings(results).interval == "95% interval"


def test_where_all_that_saves_loses_the_cheapest_loss_is_named():
    findings = comparison(
        full(50, 1.913, fid=2.664),
        fewer(43, 50, 0.191, fid=2.689, seconds=1.4),
        fewer(31, 50, 0.405, fid=2.786, seconds=1.1),
        {"saving": 0.334, "saving_interval": [0.2, 0.4], "seconds": 1.3, "fid": 40.0},
    )
    text = said(findings)
    assert "Nothing saves time without a distinguishable loss of FID." in text
    assert "(lowest time × FID) is full depth in 31 steps, which saves 40.5%" in text
    assert "(95% interval 39.5% to 41.5%) at a FID of 2.79 against full depth's 2.66" in text


def test_equal_images_are_not_too_few():
    same = {"fid": 2.0, "fid_jackknife": [1.9, 2.0, 2.1], "images": 9, "seconds": 1.0}
    near = {**same, "fid": 2.001, "fid_jackknife": [2.1, 2.0, 1.9]}
    results = {**one_row(), "rows": comparison(same, same, near).rows}
    results["protocol"]["extractor"] = {"dim": 2}
    text = dict(summary(results, Findings(results)))["Caution"]
    assert "to distinguish 2 of 3 pairs of methods" in text  # the equal pair is not among them


@pytest.mark.parametrize(("level", "means"), [(0.0, False), (0.25, False), (0.5, True)])
def test_figures_of_images_from_noise_that_is_taken_for_data(level, means):
    """One step of "leading" is at timestep 0, where the network is told there is no noise."""
    results = one_row()
    results["rows"][0] |= {"sampler": "ddim", "steps": 1, "fid": 300.0}
    results["protocol"] |= {"extractor": {"dim": 2}, "first_levels": {"ddim:1": level}}
    text = dict(summary(results, Findings(results))).get("Caution", "")
    assert ("The figures of DDIM 1 mean nothing" in text) is not means
    results["rows"][0]["fid"] = None
    assert "mean nothing" not in str(summary(results, Findings(results)))


def test_full_depth_of_equal_time_is_preferably_no_faster():
    steps = [
        {"method": "full", "kind": "full", "steps": n, "seconds": s, "fid": 3.0}
        for n, s in ((50, 20.0), (40, 11.2), (30, 9.9))
    ]
    findings = comparison(*steps, {"seconds": 10.0, "fid": 2.0}, {"seconds": 11.3, "fid": 2.0})
    assert findings.same_time(findings.rows[3])["steps"] == 40
    assert findings.same_time(findings.rows[4])["steps"] == 40  # the nearest, as none is slower


def test_full_depth_of_equal_quality_is_the_fastest_whose_fid_is_not_higher():
    rows = [full(50, 10.0, fid=2.0), fewer(40, 50, 0.2, fid=2.1), fewer(30, 50, 0.4, fid=2.5)]
    rows = [{"seconds": 9.0, **row} for row in rows]
    methods = [{"seconds": 5.0, "fid": fid} for fid in (2.2, 3.0, 1.9)]
    findings = comparison(*rows, *methods)
    found = [findings.same_quality(row) for row in findings.rows[3:]]
    assert found == [findings.rows[1], findings.rows[2], None]
    noisy = {"images": 9, "fid_jackknife": [1.0, 4.0, 2.5]}
    other = {"images": 9, "fid_jackknife": [4.0, 2.5, 1.0]}
    findings = comparison(*({**row, **noisy} for row in rows), {**methods[0], **other})
    *_, fastest, method = findings.rows
    assert verdict(fastest, method) == "not distinguishable"
    assert findings.same_quality(method) is fastest


def test_a_method_is_shown_against_full_depth_of_equal_time_and_quality():
    findings = comparison(
        full(50, 100.0, fid=2.0),
        fewer(40, 50, 0.2, fid=2.5, seconds=80.0),
        {"seconds": 75.0, "fid": 2.2},
        {"seconds": 10.0, "fid": 1.0},
    )
    table = against_full_depth(findings)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["m2", "DDIM 50", "1.500", "2.20", "2.50 (40 steps)", "lower", "2.000 (50 steps)"],
        ["m3", "DDIM 50", "0.200", "1.00", "–", "–", "–"],
    ]
    assert table.footnotes == [
        "no full depth in fewer steps takes about as long",
        "every full depth has a higher FID",
    ]
    assert against_full_depth(comparison({"seconds": 1.0, "fid": 1.0})) is None
