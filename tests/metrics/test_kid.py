import numpy as np
import pytest
import torch
from feature_rows import batches_of
from hypothesis import given
from hypothesis import strategies as st

from accelkit.metrics import kid as module
from accelkit.metrics.kid import kid, squared_mmd
from accelkit.metrics.rows import TooFewError, drawn


def distance(x, y, seed=0, sizes=(7, 64)):
    return kid(batches_of(sizes, pooled=x), len(x), batches_of(sizes, pooled=y), len(y), seed)


@given(a=st.floats(-2, 2), b=st.floats(-2, 2), d=st.integers(1, 5))
def test_two_points_agree_with_the_closed_form(a, b, d):
    """With equal images on each side it is k(a, a) + k(b, b) - 2 k(a, b)."""
    expected = (a * a + 1) ** 3 + (b * b + 1) ** 3 - 2 * (a * b + 1) ** 3
    found = squared_mmd(np.full((4, d), a), np.full((3, d), b))
    assert found == pytest.approx(expected, abs=1e-9)


def test_mmd_is_that_of_torchmetrics():
    oracle = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 9)), rng.normal(0.3, 1.2, (40, 9))
    expected = oracle(torch.from_numpy(y), torch.from_numpy(x)).item()
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)


def test_distance_is_the_mean_over_the_subsets_drawn(monkeypatch):
    oracle = pytest.importorskip("torchmetrics.image.kid").poly_mmd
    monkeypatch.setattr(module, "SUBSET_IMAGES", 30)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(211, 5)), rng.normal(0.5, 1, (90, 5))
    each = [
        oracle(
            torch.from_numpy(x[drawn(211, 30, 4, 2 * i)]),
            torch.from_numpy(y[drawn(90, 30, 4, 2 * i + 1)]),
        ).item()
        for i in range(100)
    ]
    assert distance(x, y, seed=4) == pytest.approx((np.mean(each), np.std(each)), rel=1e-10)


def test_the_distance_within_a_distribution_is_zero_on_average():
    rng = np.random.default_rng(2)
    values = [distance(*rng.normal(size=(2, 200, 4)), seed=i)[0] for i in range(12)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(12)
    assert min(values) < 0 < max(values)  # unbiased, not squared
    far = distance(rng.normal(size=(200, 4)), rng.normal(1, 1, (200, 4)))[0]
    assert far > 20 * np.std(values)


def test_batches_do_not_change_a_bit():
    x, y = np.random.default_rng(3).normal(size=(2, 150, 3)).astype(np.float32)
    assert distance(x, y, sizes=(1,)) == distance(x, y, sizes=(150,))


def test_half_precision_is_multiplied_in_single():
    """Products of float16 end at 65,504: 300 features of 20 are 120,000."""
    x = (20 + np.random.default_rng(4).normal(size=(2, 40, 300))).astype(np.float16)
    found = distance(x[0], x[1])
    assert found == pytest.approx(distance(*x.astype(np.float64)), rel=0.01)


def test_too_few_images_are_refused():
    with pytest.raises(TooFewError, match="4 images a side, got 3 and 50"):
        distance(np.ones((3, 2)), np.ones((50, 2)))
