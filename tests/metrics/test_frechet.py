import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accelkit.errors import AccelkitError
from accelkit.metrics.frechet import Gaussian, Moments


def moments(*batches):
    seen = Moments()
    for batch in batches:
        seen.update(batch)
    return seen


def frechet_distance(mean1, cov1, mean2, cov2):
    first = Gaussian.of(mean1, cov1, ("mean1", "cov1"))
    return first.distance(Gaussian.of(mean2, cov2, ("mean2", "cov2")))


def distance(a, b):
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def random_cov(rng, d, rank=None):
    factor = rng.normal(size=(d, d if rank is None else rank))
    return factor @ factor.T + (np.eye(d) if rank is None else 0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda s: sum(s) >= 2),
    d=st.integers(1, 5),
    offset=st.sampled_from([0.0, -3.0, 1e6]),
)
def test_streaming_equals_numpy_whatever_the_batching(seed, sizes, d, offset):
    x = np.random.default_rng(seed).normal(size=(sum(sizes), d)) + offset
    batches = np.split(x, np.cumsum(sizes)[:-1])
    seen = moments(*batches)
    assert seen.n == len(x)
    np.testing.assert_allclose(seen.mean, x.mean(axis=0), rtol=1e-12, atol=1e-12)
    # numpy's own error with an offset of 1e6 is about 1e-10 of a unit variance
    np.testing.assert_allclose(seen.cov, np.cov(x.T).reshape(d, d), rtol=1e-8, atol=1e-8)

    halves = [moments(*batches[::2]), moments(*batches[1::2])]
    for first, second in (halves, halves[::-1]):
        merged = Moments()
        merged.merge(first)
        merged.merge(second)
        assert merged.n == len(x)
        np.testing.assert_allclose(merged.mean, seen.mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(merged.cov, seen.cov, rtol=1e-8, atol=1e-8)


def test_merge_leaves_the_other_alone_and_may_be_itself():
    x = np.random.default_rng(0).normal(size=(7, 3))
    seen, other = moments(x), moments(x[:4])
    fresh = Moments()
    fresh.merge(other)
    fresh.update(x)
    np.testing.assert_array_equal(other.mean, x[:4].mean(axis=0))
    np.testing.assert_allclose(other.cov, np.cov(x[:4].T), rtol=1e-12)
    seen.merge(seen)
    np.testing.assert_allclose(seen.cov, np.cov(np.concatenate([x, x]).T), rtol=1e-12)


def test_what_is_returned_is_not_the_running_state():
    x = np.random.default_rng(0).normal(size=(7, 3))
    seen = moments(x)
    seen.mean[:] = 9
    seen.cov[:] = 9
    np.testing.assert_allclose(seen.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(seen.cov, np.cov(x.T), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_tensors_are_summed_in_float64(dtype):
    x = (torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)
    reference = x.double().numpy()
    seen = moments(x[:150].requires_grad_(), x[150:])
    np.testing.assert_allclose(seen.cov, np.cov(reference.T), rtol=1e-12, atol=1e-13)


def test_moments_refuse_bad_input():
    seen = moments(np.ones((2, 3)))
    with pytest.raises(AccelkitError, match=r"\(3,\), expected \(n, d\)"):
        seen.update(np.ones(3))
    with pytest.raises(AccelkitError, match="4 wide, expected 3"):
        seen.update(np.ones((1, 4)))
    with pytest.raises(AccelkitError, match="4 wide, expected 3"):
        seen.merge(moments(np.ones((2, 4))))
    for bad in (np.nan, np.inf):
        with pytest.raises(AccelkitError, match="1 of 2 feature rows"):
            seen.update(np.array([[0, 0, 0], [0, bad, bad]]))
    for wrong in ([[1.0, 2.0, 3.0]], np.ones((1, 3), complex), torch.ones(1, 3).to(torch.cfloat)):
        with pytest.raises(TypeError):
            seen.update(wrong)
    assert seen.n == 2
    np.testing.assert_array_equal(seen.mean, np.ones(3))


def test_moments_of_too_few_samples():
    with pytest.raises(AccelkitError, match="mean of no samples"):
        _ = Moments().mean
    with pytest.raises(AccelkitError, match=r"covariance of 1 sample"):
        _ = moments(np.ones((1, 3))).cov


@pytest.mark.parametrize("d", [1, 2, 17, 64])
def test_distance_agrees_with_scipy(d):
    rng = np.random.default_rng(d)
    m1, m2, s1, s2 = rng.normal(size=d), rng.normal(size=d), random_cov(rng, d), random_cov(rng, d)
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
    found = frechet_distance(m1, s1, m2, s2)
    assert found == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m2, s2, m1, s1) == pytest.approx(found, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), d=st.integers(1, 8), zeros=st.integers(0, 8))
def test_distance_of_commuting_covariances(seed, d, zeros):
    rng = np.random.default_rng(seed)
    m1, m2 = rng.normal(size=(2, d))
    roots1, roots2 = rng.uniform(0.1, 3, size=(2, d))
    roots1[:zeros] = 0  # singular when zeros > 0
    expected = ((m1 - m2) ** 2).sum() + ((roots1 - roots2) ** 2).sum()
    basis = np.linalg.qr(rng.normal(size=(d, d)))[0]
    for q in (np.eye(d), basis):
        s1, s2 = (q * roots1**2) @ q.T, (q * roots2**2) @ q.T
        assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(m2, s2, m1, s1) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_of_few_samples():
    """For S = A A^T the trace of the root is the nuclear norm of A1^T A2: a small exact problem."""
    rng = np.random.default_rng(0)
    d = 40
    x, y = rng.normal(size=(6, d)), 2 * rng.normal(size=(9, d)) + 1
    a, b = moments(x), moments(y)
    factor_x = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    factor_y = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    expected = (
        ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum()
        + (factor_x**2).sum()
        + (factor_y**2).sum()
        - 2 * np.linalg.norm(factor_x @ factor_y.T, "nuc")
    )
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distance(b, a) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [5, 40, 400])
def test_distance_of_a_set_to_itself_is_zero(n):
    x = np.random.default_rng(n).normal(size=(n, 40))
    itself, shuffled = moments(x), moments(x[: n // 2], x[n // 2 :][::-1])
    for other in (itself, shuffled):
        assert 0 <= distance(itself, other) < 1e-10


def test_one_point_has_no_spread():
    """Between two points, and from a point to a Gaussian, the distance is elementary."""
    nothing, s = np.zeros((3, 3)), np.diag([1.0, 2.0, 3.0])
    assert frechet_distance(np.zeros(3), nothing, np.ones(3), nothing) == 3
    assert frechet_distance(np.zeros(3), nothing, np.ones(3), s) == pytest.approx(9, rel=1e-14)


def test_float32_covariances_pass_for_what_they_are():
    rng = np.random.default_rng(0)
    s1, s2 = random_cov(rng, 30, rank=10), random_cov(rng, 30, rank=12)
    mean = np.zeros(30)
    exact = frechet_distance(mean, s1, mean, s2)
    rounded = frechet_distance(mean, s1.astype(np.float32), mean, s2.astype(np.float32))
    assert rounded == pytest.approx(exact, rel=1e-2)


def test_distance_refuses_bad_input():
    mean, cov = np.zeros(2), np.eye(2)
    with pytest.raises(AccelkitError, match=r"mean2 has shape \(1, 2\)"):
        frechet_distance(mean, cov, mean[None], cov)
    with pytest.raises(AccelkitError, match="features of one extractor"):
        frechet_distance(mean, cov, np.zeros(3), np.eye(3))
    with pytest.raises(AccelkitError, match=r"cov2 has shape \(3, 3\)"):
        frechet_distance(mean, cov, mean, np.eye(3))
    with pytest.raises(AccelkitError, match="cov1 is not symmetric"):
        frechet_distance(mean, np.array([[1.0, 0.5], [0.0, 1.0]]), mean, cov)
    with pytest.raises(AccelkitError, match="cov1 has the eigenvalue -1"):
        frechet_distance(mean, np.diag([1.0, -1.0]), mean, cov)
    with pytest.raises(AccelkitError, match="mean1 holds NaN"):
        frechet_distance(mean * np.nan, cov, mean, cov)
    with pytest.raises(AccelkitError, match="cov2 holds NaN"):
        frechet_distance(mean, cov, mean, np.full((2, 2), np.inf))
