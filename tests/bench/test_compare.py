"""Comparisons: who runs when on what, what is counted, and the files left."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from typer.testing import CliRunner

import accelkit
from accelkit.bench import compare as module
from accelkit.bench import report
from accelkit.bench.compare import Variant, Work, compare, reference_moments
from accelkit.cli import app
from accelkit.data.digits import digits
from accelkit.errors import AccelkitError
from accelkit.metrics.features import extractor
from accelkit.sample.generate import Sampling
from accelkit.schedule import Schedule
from accelkit.switch import enabled_on

FULL, HALF, LOW = (Schedule.parse(s, 6) for s in ("full", "uniform:3", "6@0.5,1@1"))


@pytest.fixture
def studio(monkeypatch):
    """Replaces sampling and clock: every call takes the seconds that are next in ``takes``."""
    calls, takes, now = [], [], [0.0]

    def generate(pipe, labels, seeds, how):
        state = enabled_on(pipe)
        schedule = str(state.schedule) if state else "none"
        calls.append(SimpleNamespace(pipe=pipe, schedule=schedule, labels=labels, seeds=seeds,
                                     how=how))  # fmt: skip
        if how.steps != 2:  # the warm-up has two steps
            now[0] += takes.pop(0) if takes else 1.0
        return digits()[0][[s % 1797 for s in seeds]]

    monkeypatch.setattr(module, "generate", generate)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return SimpleNamespace(calls=calls, takes=takes)


def work(images=6, batch=2, classes=(4, 7, 8), seed=100, steps=10):
    return Work(images, batch, Sampling("ddim", steps, 2.0, 3), classes, seed)


def test_variants_take_turns_on_the_same_work(studio, pipe):
    progress = []
    compare(
        [Variant(pipe, s) for s in (FULL, HALF, LOW)],
        work(),
        on_batch=lambda done, total: progress.append((done, total)),
    )
    warm, calls = studio.calls[:3], studio.calls[3:]
    names = [str(FULL), str(HALF), str(LOW)]  # full depth runs by the same path as the others
    assert [c.schedule for c in warm] == names
    assert {c.how.steps for c in warm} == {2}
    assert [c.schedule for c in calls] == names * 3
    assert {(c.how.steps, c.how.guidance, c.how.guidance_channels) for c in calls} == {(10, 2.0, 3)}
    batches = [([4, 7], [100, 101]), ([8, 4], [102, 103]), ([7, 8], [104, 105])]
    assert [(c.labels, c.seeds) for c in calls] == [b for b in batches for _ in names]
    assert progress == [(i + 1, 9) for i in range(9)]
    assert enabled_on(pipe) is None


def test_the_saving_is_the_median_of_the_paired_ratios(studio, pipe):
    # the machine slows down by half an order on the way; pairs of neighbours do not mind
    studio.takes += [10, 5, 20, 18, 40, 10]
    rows = compare([Variant(pipe, FULL), Variant(pipe, HALF)], work())
    assert [row["saving"] for row in rows] == [0, 0.5]  # of ratios 0.5, 0.9 and 0.25
    assert [row["seconds"] for row in rows] == [20, 10]
    assert rows[1]["seconds_quartiles"] == [7.5, 14]


def test_the_baseline_may_stand_anywhere_or_be_missing(studio, pipe):
    studio.takes += [3, 4]
    rows = compare([Variant(pipe, HALF), Variant(pipe, FULL)], work(2))
    assert rows[0]["saving"] == 0.25
    assert compare([Variant(pipe, HALF)], work(2))[0]["saving"] is None


def test_a_shorter_last_batch_counts_in_ratios_alone(studio, pipe):
    studio.takes += [10, 8, 10, 8, 2, 1]
    rows = compare([Variant(pipe, FULL), Variant(pipe, HALF)], work(5))
    assert [len(c.seeds) for c in studio.calls[-2:]] == [1, 1]
    assert [row["seconds"] for row in rows] == [10, 8]
    assert rows[1]["saving"] == pytest.approx(0.2)  # of ratios 0.8, 0.8 and 0.5
    assert [row["images"] for row in rows] == [5, 5]


def test_rows_say_what_ran(studio, pipe):
    rows = compare([Variant(pipe, FULL), Variant(pipe, LOW, tuned=True)], work(2))
    assert [row["schedule"] for row in rows] == ["full", "6@0.5,1@1"]
    assert [row["spelled"] for row in rows] == ["6@1", "6@0.5,1@1"]
    assert [row["tuned"] for row in rows] == [False, True]
    assert [row["layers"] for row in rows] == [6, 6]
    # DDIM in ten steps visits 900, 800, ..., 0: five of them at or above a half
    assert rows[1]["mean_depth"] == pytest.approx(3.5)
    assert rows[1]["ideal_saving"] == pytest.approx(2.5 / 6)
    assert [row["fid"] for row in rows] == [None, None]


def test_the_distance_of_a_set_from_itself_is_nothing(studio, pipe):
    features = extractor("digits")
    images = digits()[0][:300]
    reference = reference_moments(iter([images[:200], images[200:]]), features)
    row = compare([Variant(pipe, FULL)], work(300, 150, seed=0), features, reference)[0]
    assert 0 <= row["fid"] < 1e-6
    other = compare([Variant(pipe, FULL)], work(300, 150, seed=300), features, reference)[0]
    assert 0.5 < other["fid"] < 30  # other digits, by other hands
    one = compare([Variant(pipe, FULL)], work(1, 1), features, reference)[0]
    assert one["fid"] is None  # no covariance of one image


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 1)])
def test_no_work_is_refused(sizes):
    with pytest.raises(AccelkitError, match="at least 1"):
        Work(*sizes, Sampling(), (0,))


# --- what is left behind


def row(schedule, tuned, fid, seconds):
    return {
        "schedule": schedule,
        "tuned": tuned,
        "fid": fid,
        "seconds": seconds,
        "ideal_saving": 0.0 if schedule == "full" else 0.3,
    }


@pytest.mark.parametrize("fids", [(1.0, 2.0, 1.5), (None, None, None)])
def test_the_plot_opens(tmp_path, fids):
    names = (("full", False), ("D4", False), ("D4", True))
    rows = [row(*name, fid, 1.0 + i) for i, (name, fid) in enumerate(zip(names, fids, strict=True))]
    report.plot(tmp_path / "p.png", rows, "DDIM, 50 steps")
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (960, 600)
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def bench(model, output, *arguments):
    sizes = ("-n", "4", "--batch-size", "2", "--steps", "2")
    return cli("bench", "--model", model, "-o", output, *sizes, *arguments)


@pytest.fixture
def data(tmp_path):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    return tmp_path / "data"


@pytest.fixture
def base(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_artifact_is_measured_beside_its_base(base, make_pipe, data, tmp_path, monkeypatch):
    tuned = make_pipe(seed=1)
    accelkit.enable(tuned, "uniform:2")
    accelkit.save(tuned, tmp_path / "tuned", base_model=str(base))
    seen = []
    real = module.generate

    def spied(pipe, *args):
        weight = pipe.transformer.proj_out_2.weight
        state = enabled_on(pipe)
        seen.append((str(state.schedule) if state else "none", weight.detach().clone()))
        return real(pipe, *args)

    monkeypatch.setattr(module, "generate", spied)
    run = tmp_path / "bench"
    done = bench(tmp_path / "tuned", run, "--schedules", "full, uniform:3", "--data", data,
                 "--json")  # fmt: skip
    rows = json.loads(done.stdout)["rows"]
    named = [(r["schedule"], r["tuned"]) for r in rows]
    assert named == [
        ("full", False),
        ("uniform:3", False),
        ("uniform:2", False),
        ("uniform:2", True),
    ]
    own = DiTPipeline.from_pretrained(base).transformer.proj_out_2.weight
    new = tuned.transformer.proj_out_2.weight
    assert [name for name, _ in seen] == ["6@1", "3@1", "2@1", "2@1"] * 3
    for i, (_, weight) in enumerate(seen):
        assert torch.equal(weight, new if i % 4 == 3 else own)

    results = json.loads((run / "results.json").read_text())
    assert results["schema"] == 1
    assert results["rows"] == rows
    protocol = results["protocol"]
    assert protocol["classes"] == 3
    assert protocol["features"] is None
    assert protocol["evaluation"]["sampling"] == {
        "sampler": "ddim",
        "steps": 2,
        "guidance": 1.0,
        "guidance_channels": None,
    }
    assert {"command", "model", "data", "machine", "order"} <= protocol.keys()
    with Image.open(run / "samples.png") as image:
        assert image.size == (10 * 10 + 2, 4 * 10 + 2)
    assert {p.name for p in run.iterdir()} == {"results.json", "results.png", "samples.png"}


def test_results_are_replaced_on_demand_only(base, data, tmp_path):
    bench(base, tmp_path / "run", "--schedules", "uniform:1", "--data", data)
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(AccelkitError, match="--overwrite"):
        bench(base, tmp_path / "run", "--schedules", "uniform:2", "--data", data)
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    literals = "3@0.5,1@1; 6@0.5,2@1"
    bench(base, tmp_path / "run", "--schedules", literals, "--data", data, "--overwrite")
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [r["spelled"] for r in rows] == ["6@1", "3@0.5,1@1", "6@0.5,2@1"]


def test_digits_are_scored(tmp_path):
    done = bench("builtin", tmp_path / "run", "--schedules", "D6")
    assert "time saved" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    features = results["protocol"]["features"]
    assert features == {"name": extractor("digits").name, "sha256": extractor("digits").sha256}
    assert results["protocol"]["classes"] == 10
    assert all(r["fid"] > 0 for r in results["rows"])
