"""``accelkit bench`` from the command line to its results: methods, measurements, resumption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from typer.testing import CliRunner

import accelkit
from accelkit.bench import harness, judging
from accelkit.bench.harness import Variant
from accelkit.bench.methods import parse_methods
from accelkit.bench.report.report import write_report
from accelkit.bench.results import read_results
from accelkit.cli import app
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.jobs import bench as job
from accelkit.runtime.switch import enabled_on
from accelkit.sample.generate import Sampling, generate
from accelkit.subject import Subject

SMALL = (
    *("-n", "2", "--batch-size", "2", "--samplers", "ddim:3", "--rounds", "1"),
    *("--timing-batch-size", "2", "--throughput", "", "--baselines", ""),
)
DIGITS = (
    *("bench", "--schedules", "full", "--baselines", "", "--samplers", "ddim:2", "-n", "320"),
    *("--rounds", "1", "--timing-batch-size", "1", "--throughput", ""),
)
"""A comparison of the built-in model, which has figures of quality."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for name in ("ant", "bee", "cat"):
        (folder / name).mkdir()
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / "0.png")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The directory of a whole comparison of the built-in model."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "write_report", lambda *args: None)
        cli(*DIGITS, "--batch-size", "64", "-o", folder)
    return folder


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def bench(model, data, tmp_path):
    """Runs it on the small model and returns what ``results.json`` holds."""

    def run(*options, output=tmp_path / "run", model=model):
        cli("bench", "--model", model, "--data", data, "-o", output, *SMALL, *options)
        return read_results(output / "results.json")

    return run


@pytest.fixture
def ran(monkeypatch):
    """The schedules of timed calls, in order."""
    seen, real = [], harness.generate_latents

    def spied(subject, *args):
        state = enabled_on(subject)
        seen.append(str(state.schedule) if state else "none")
        return real(subject, *args)

    monkeypatch.setattr(harness, "generate_latents", spied)
    return seen


def names(results, *fields):
    return [tuple(row[f] for f in fields) for row in results["rows"]]


def test_methods_times_samplers(bench, ran):
    results = bench(
        *("--schedules", "uniform:3,uniform:3+tome:0.5", "--baselines", "tome:0.5"),
        *("--samplers", "ddim:3,ddpm:2", "--rounds", "2"),
    )
    methods = ["full", "uniform:3", "uniform:3+tome:0.5", "tome:0.5"]
    assert names(results, "method", "sampler", "steps") == [
        (method, *sampler) for sampler in (("ddim", 3), ("ddpm", 2)) for method in methods
    ]
    kinds = ["full", "schedule", "combination", "baseline"]
    assert [row["kind"] for row in results["rows"]] == kinds * 2
    # interleaved: a cold round, then two timed ones in which a brief call goes before each
    spelled = ["6@1", "3@1", "3+tome:0.5@1", "6+tome:0.5@1"] * 2
    assert ran[: 8 * 5] == spelled + [s for s in spelled for _ in (1, 2)] * 2
    for row in results["rows"]:
        assert row["skipped"] is None
        assert row["seconds"] > row["denoiser_seconds"] > 0
        assert row["seconds_quartiles"][0] <= row["seconds"] <= row["seconds_quartiles"][1]
        low, high = row["saving_interval"]
        assert low <= row["saving"] <= high
        assert row["fid"] is None  # there is no feature extractor for such images
        assert row["energy_joules"] is None or torch.cuda.is_available()
        assert sys.platform != "linux" or row["peak_memory_bytes"] > 10**8
    assert [row["saving"] for row in results["rows"][::4]] == [0, 0]
    assert results["rows"][1]["ideal_saving"] == pytest.approx(0.5)


def test_fewer_steps_stand_beside_schedules(bench, ran):
    results = bench("--schedules", "uniform:2", "--baselines", "steps", "--samplers", "ddim:9")
    assert [row["method"] for row in results["rows"]] == ["full", "uniform:2", "steps:3"]
    fewer = results["rows"][2]
    assert fewer["steps"] == 3
    assert fewer["ideal_saving"] == pytest.approx(2 / 3)
    calls = results["rows"][0]["macs_per_image"]
    assert fewer["macs_per_image"] == pytest.approx(calls / 3)


def test_guidance_costs_two_calls(pipe):
    [full] = parse_methods("full", pipe)
    variant = Variant(Subject.of(pipe), full)
    plain, guided = (
        harness.cost(variant, Sampling("ddim", 2, guidance))["macs_per_image"]
        for guidance in (1.0, 2.0)
    )
    assert guided == 2 * plain


def test_time_by_depth_and_batch(bench):
    results = bench("--schedules", "6@0.5,2@1;uniform:4", "--throughput", "1,3")
    assert [row["depth"] for row in results["depths"]] == [2, 4, 6]
    macs = [row["macs"] for row in results["depths"]]
    assert macs[1] - macs[0] == macs[2] - macs[1] > 0
    sizes = [(row["method"], row["batch_size"]) for row in results["throughput"]]
    methods = [row["method"] for row in results["rows"]]
    assert sizes == [(method, size) for method in methods for size in (1, 3)]


def test_what_has_no_room_is_a_row_that_says_so(bench, monkeypatch):
    real = harness.generate_latents

    def short_of(subject, items, *args):
        if enabled_on(subject).schedule.depths[-1] == 3 or len(items) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(subject, items, *args)

    monkeypatch.setattr(harness, "generate_latents", short_of)
    results = bench("--schedules", "uniform:3,uniform:2", "--throughput", "2,4")
    reasons = {row["method"]: row["skipped"] for row in results["rows"]}
    assert reasons["full"] is reasons["uniform:2"] is None
    assert reasons["uniform:3"] == "there is no room for 2 images at a time in the GPU's memory"
    sizes = [(row["method"], row["batch_size"]) for row in results["throughput"]]
    assert ("full", 2) in sizes
    assert ("uniform:3", 2) not in sizes
    assert all(size == 2 for _, size in sizes)


def test_nothing_is_measured_twice(bench, ran, tmp_path):
    first = bench("--schedules", "uniform:3")
    ran.clear()
    again = bench("--schedules", "uniform:3")
    assert ran == []
    for results in (first, again):
        del results["protocol"]["created"]
    assert again == first
    more = bench("--schedules", "uniform:3,uniform:2")
    assert "uniform:2" in [row["method"] for row in more["rows"]]
    bench("--schedules", "uniform:3", "--overwrite")
    assert len(ran) > 0


def test_timing_goes_on_with_the_round_it_was_killed_in(bench, ran, tmp_path, monkeypatch):
    options = ("--schedules", "uniform:3", "--rounds", "3")
    real, made = harness.run, []

    def killed(*args, **kwargs):
        if len(made) == 2 * 2 + 1:  # in the second counted round of two runs
            raise RuntimeError("killed")
        made.append(1)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "run", killed)
        with pytest.raises(RuntimeError, match="killed"):
            bench(*options)
    (kept,) = (tmp_path / "run").rglob("rounds.json")
    rounds = json.loads(kept.read_text())["rounds"]
    assert len(rounds) == 2
    made.clear()
    monkeypatch.setattr(harness, "run", lambda *a, **k: (made.append(1), real(*a, **k))[1])
    results = bench(*options)
    assert len(made) == 2 * 3  # two rounds, and one to warm up
    all_rounds = json.loads(kept.read_text())["rounds"]
    assert all_rounds[:2] == rounds
    assert len(all_rounds) == 4
    first = [row[0]["seconds"] for row in all_rounds]
    assert results["rows"][0]["first_call_seconds"] == first[0]
    assert results["rows"][0]["seconds"] == np.median(first[1:])


def test_what_was_damaged_is_measured_again(bench, tmp_path):
    options = ("--schedules", "uniform:3")
    bench(*options)
    run = tmp_path / "run"
    pictures = {path: path.read_bytes() for path in run.rglob("samples/*.png")}
    (times,) = (p for p in run.glob("cells/*/cell.json") if '"times"' in p.read_text())
    for path in (times, *run.glob("cells/*/samples.png")):
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    with pytest.warns(AccelkitWarning) as caught:
        bench(*options)
    (warning,) = (str(w.message) for w in caught if w.category is AccelkitWarning)
    assert f"cannot use {times} (" in warning
    assert warning.endswith("; measuring again")
    assert {path: path.read_bytes() for path in run.rglob("samples/*.png")} == pictures
    (run / "results.json").write_bytes(b"{" + (run / "results.json").read_bytes())
    with pytest.raises(AccelkitError, match=r"results\.json"):
        bench(*options)
    (run / "results.json").unlink()
    bench(*options)


def test_other_weights_are_other_measurements(bench, make_pipe, model, ran, tmp_path):
    own = shutil.copytree(model, tmp_path / "model")
    bench("--schedules", "full", model=own)
    make_pipe(seed=5).save_pretrained(own)
    ran.clear()
    bench("--schedules", "full", model=own)
    assert len(ran) > 0


def test_an_artifact_is_compared_beside_its_base(bench, make_pipe, model, tmp_path):
    tuned = make_pipe(seed=1)
    accelkit.enable(tuned, "uniform:2")
    accelkit.save(tuned, tmp_path / "tuned", base_model=str(model))
    results = bench("--schedules", "uniform:3", model=tmp_path / "tuned")
    rows = names(results, "method", "weights")[:4]
    assert rows == [
        ("full", "original"),
        ("uniform:3", "original"),
        ("uniform:2", "original"),
        ("uniform:2", "tuned"),
    ]
    assert results["protocol"]["tuned_for"] == "uniform:2"
    pictures = {}
    for sample in results["samples"][:4]:
        with Image.open(tmp_path / "run" / sample["file"]) as image:
            pictures[sample["method"], sample["weights"]] = np.asarray(image)
    own, other = (pictures["uniform:2", w] for w in ("original", "tuned"))
    assert own.shape == (12, 10 * 10 + 2, 3)
    assert not np.array_equal(own, other)
    by_option = bench(
        *("--schedules", "uniform:2", "--tuned", f"uniform:2={tmp_path / 'tuned'}"),
        output=tmp_path / "two",
    )
    assert names(by_option, "method", "weights")[:3] == [rows[0], *rows[2:]]


def test_weights_are_compared_at_what_they_are_tuned_for_alone(bench, make_pipe, model, tmp_path):
    tuned = make_pipe(seed=1)
    accelkit.enable(tuned, "uniform:2")
    for name in ("one", "two"):
        accelkit.save(tuned, tmp_path / name, base_model=str(model))
    accelkit.disable(tuned)
    larger = make_pipe(layers=4)
    accelkit.enable(larger, "uniform:2")
    larger.save_pretrained(tmp_path / "base-4")
    accelkit.save(larger, tmp_path / "four", base_model=str(tmp_path / "base-4"))
    for given, complaint in (
        ("uniform:3=one", "tuned for uniform:2, not for uniform:3"),
        ("uniform:2=four", "not for uniform:2|another network"),
        ("uniform:2=one,2@1=two", "two sets of weights"),
    ):
        places = given.replace("=", f"={tmp_path}/").replace(",", ";")
        with pytest.raises(AccelkitError, match=complaint):
            bench("--tuned", places)
    results = bench(
        *("--schedules", "uniform:2;uniform:2+tome:0.5", "--baselines", "uniform:2+pab"),
        *("--samplers", "ddim:2", "--tuned", f"uniform:2={tmp_path / 'one'}"),
    )
    tuned_rows = [row["method"] for row in results["rows"] if row["weights"] == "tuned"]
    assert tuned_rows == ["uniform:2", "uniform:2+tome:0.5", "uniform:2+pab"]


def test_full_depth_is_called_full_however_it_is_spelled(bench):
    results = bench("--schedules", "uniform:6,uniform:2", "--samplers", "ddim:1")
    assert [row["method"] for row in results["rows"]] == ["full", "uniform:2"]


def test_the_noise_at_which_each_row_begins_is_recorded(bench):
    """Timesteps 0, 500, 500 and 666, with which the saved scheduler's spacing begins."""
    options = ("--schedules", "full", "--baselines", "steps:2", "--samplers", "ddim:1,dpm:1")
    levels = bench(*options)["protocol"]["first_levels"]
    assert levels == {"ddim:1": 0.0, "ddim:2": 0.5, "dpm:1": 0.5, "dpm:2": 0.666}


def test_a_long_literal_has_a_short_file(bench, tmp_path):
    edges = [f"{1 + i % 6}@{(i + 1) / 60:.4f}" for i in range(59)]
    literal = ",".join([*edges, "6@1"])
    assert len(literal) > 300
    results = bench("--schedules", literal + ";full", "--samplers", "ddim:1")
    assert (tmp_path / "run" / results["samples"][1]["file"]).is_file()


def test_what_was_measured_survives_a_mistake(bench, tmp_path):
    bench("--schedules", "uniform:3", "--samplers", "ddim:1")
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for wrong in (("--schedules", "uniform:7"), ("--samplers", "euler:3"), ("--labels", "5000")):
        with pytest.raises(AccelkitError):
            bench("--overwrite", *wrong)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_samples_are_what_the_pipeline_makes(bench, model, tmp_path):
    results = bench("--schedules", "full")
    with Image.open(tmp_path / "run" / results["samples"][0]["file"]) as image:
        seen = np.asarray(image)[2:10, 2:10]
    pipe = DiTPipeline.from_pretrained(model)
    image = generate(pipe, [0], [0], Sampling("ddim", 3))[0]
    assert np.abs(seen.astype(int) - image).max() <= 1


def test_the_digits_are_judged(digits):
    results = read_results(digits / "results.json")
    [row] = results["rows"]
    assert row["fid"] > 0
    assert row["images"] == 320
    assert row["inception_score"] >= 1
    assert results["protocol"]["extractor"]["name"] == "digit-cnn-v1"
    assert results["protocol"]["reference"]["n"] == 1797
    assert not list((digits / "cells").rglob("features"))  # removed once they are measured


def test_a_baseline_that_cannot_run_is_a_row_that_says_so(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    results = bench("--schedules", "uniform:3", "--baselines", "cache-dit,uniform:3+cache-dit")
    skipped = [row for row in results["rows"] if row["skipped"]]
    assert [row["method"] for row in skipped] == ["cache-dit", "uniform:3+cache-dit"]
    assert "cache-dit" in skipped[0]["skipped"]
    assert all(row["seconds"] is None and row["fid"] is None for row in skipped)


def test_two_processes_make_what_one_makes(digits, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", "2", "-m", "accelkit", *DIGITS, "--batch-size", "24"),
            *("-o", str(tmp_path / "two")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    [one], [two] = (read_results(folder)["rows"] for folder in (digits, tmp_path / "two"))
    for name in ("fid", "sfid", "kid", "inception_score", "precision", "coverage"):
        assert two[name] == pytest.approx(one[name], rel=2e-3), name


def test_a_killed_bench_goes_on(digits, tmp_path):
    options = [*DIGITS, "--batch-size", "64", "-o", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "accelkit", *options],
        # the same number of threads as here, since it affects rounding
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(3000):
        if list(tmp_path.rglob("features/*.safetensors")):
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list(tmp_path.rglob("features/*.safetensors"))
    assert left
    assert not (tmp_path / "results.json").exists()

    made, real = [], judging.generate_shards

    def counted(subject, work, batch, rows_of, shards, *more):
        made.append(sum(map(len, shards.missing(work.images, batch))))
        return real(subject, work, batch, rows_of, shards, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judging, "generate_shards", counted)
        cli(*options)
    assert made[0] <= 320 - 64 * len(left)
    [killed], [whole] = (read_results(folder)["rows"] for folder in (tmp_path, digits))
    assert killed["fid"] == whole["fid"]


BAD = [
    (("--samplers", "ddim"), "cannot read the sampler 'ddim'"),
    (("--samplers", "ddim:0"), "sampling steps"),
    (("--samplers", ""), "no sampler"),
    (("--samplers", "euler:5"), "unknown sampler 'euler'"),
    (("--rounds", "0"), "rounds must be at least 1"),
    (("-n", "0"), "images must be at least 1"),
    (("--throughput", "a"), "--throughput takes batch sizes"),
    (("--throughput", "0"), "at least 1 image"),
    (("--tuned", "D4"), "--tuned takes schedules with their models"),
    (("--tuned", "uniform:3=nowhere"), "nowhere holds no model that was fine-tuned"),
    (("--baselines", "steps:2000"), "give 1 to 1000"),
    (("--labels", "2000"), "classes 0 to"),
    (("--labels", "x"), "cannot read the labels"),
    (("--baselines", "fist_block_cache"), "unknown method"),
    (("--features", "no.pt"), r"no\.pt"),
    (("--features", "digits", "--features-sha256", "0" * 64), "SHA-256"),
    (("--features", "digits"), "32"),  # whose extractor takes images of 32 pixels
    (("--reference", "no.npz"), "give --features with --reference"),
]


@pytest.mark.parametrize(("options", "complaint"), BAD)
def test_bad_input_is_refused_before_anything_is_measured(bench, ran, options, complaint):
    with pytest.raises(AccelkitError, match=complaint):
        bench(*options)
    assert ran == []


def test_places_that_hold_something_else_are_left(bench, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AccelkitError, match="is a file"):
        bench(output=tmp_path / "file")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "run.json").write_text("{}")
    with pytest.raises(AccelkitError, match="holds a training run"):
        bench(output=tmp_path / "training")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text('{"schema": 1, "rows": []}')
    with pytest.raises(AccelkitError, match="schema version 1"):
        bench(output=tmp_path / "old")


def test_another_extractor_is_not_mixed_in(digits, tmp_path):
    results = json.loads((digits / "results.json").read_text())
    results["protocol"]["extractor"]["sha256"] = "0" * 64
    del results["sha256"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(AccelkitError, match="do not compare"):
        cli(*DIGITS, "-o", tmp_path)


def test_the_report_is_written_again_from_the_results(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "write_report", write_report)
    bench("--schedules", "uniform:3")
    run = tmp_path / "run"
    before = (run / "report.html").read_bytes()
    for name in ("report.html", "report.md"):
        (run / name).unlink()
    done = cli("report", run)
    assert (run / "report.html").read_bytes() == before
    assert str(run / "report.md") in done.output
    with pytest.raises(AccelkitError, match="cannot read"):
        cli("report", tmp_path / "nothing")
