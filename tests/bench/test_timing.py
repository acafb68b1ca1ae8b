"""Clocks, intervals of ratios, and marks of memory."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelkit.bench import timing
from accelkit.bench.timing import Energy, Peak, Stopwatch, median_ratio


def test_parts_are_the_seconds_between_marks(monkeypatch):
    now = iter([1.0, 3.5, 4.0, 9.0, 9.25])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    watch = Stopwatch("cpu")
    for _ in range(3):
        watch.mark()
    assert watch.parts() == [2.5, 0.5]
    watch.mark()
    watch.mark()
    assert watch.parts() == [0.25]
    assert watch.clock == "perf_counter"


def test_the_ratio_is_that_of_neighbours():
    # the machine slows down by an order of magnitude on the way
    ratio, interval = median_ratio([5, 9, 25, 50, 40], [10, 20, 50, 100, 80])
    assert ratio == 0.5
    assert interval == pytest.approx([0.45, 0.5])


def test_equal_runs_have_no_interval():
    assert median_ratio([2.0] * 4, [4.0] * 4) == (0.5, [0.5, 0.5])


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        ratios = 0.7 * np.exp(draw.normal(0, 0.05, 25))
        _, (low, high) = median_ratio(ratios, np.ones(25))
        held += low <= 0.7 <= high
    assert 86 <= held <= 100  # binomial of 0.95 and 100: below 86 once in 10,000


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0.1, 10))
def test_the_interval_lies_around_the_median(base, factor):
    ratio, (low, high) = median_ratio([factor * b for b in base], base)
    assert low <= ratio <= high
    assert ratio == pytest.approx(factor)


def test_the_peak_falls_again():
    big = torch.ones(60_000_000)  # 240 MB
    held = Peak("cpu").bytes()
    del big
    now = Peak("cpu").bytes()
    if held is None:
        pytest.skip("the system does not tell")
    assert held - now > 200e6


def test_the_peak_of_what_is_freed_again_is_told():
    peak = Peak("cpu")
    before = peak.bytes()
    torch.ones(60_000_000)
    if before is None:
        pytest.skip("the system does not tell")
    assert peak.bytes() - before > 200e6


def test_there_is_no_energy_of_a_cpu():
    assert Energy("cpu").joules() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_time_a_gpu():
    watch = Stopwatch("cuda")
    x = torch.randn(4096, 4096, device="cuda")
    began = time.perf_counter()
    watch.mark()
    for _ in range(50):
        x = x @ x
        x = x / x.norm()
    watch.mark()
    (seconds,) = watch.parts()
    assert 0 < seconds <= time.perf_counter() - began
