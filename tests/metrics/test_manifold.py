import numpy as np
import pytest
from feature_rows import batches_of
from sklearn.neighbors import NearestNeighbors

from accelkit.metrics import manifold, rows
from accelkit.metrics.manifold import manifold_metrics, squared_distances
from accelkit.metrics.rows import TooFewError


def metrics(generated, real, nearest=3, sizes=(7, 64)):
    return manifold_metrics(
        batches_of(sizes, pooled=generated),
        batches_of(sizes, pooled=real),
        np.arange(len(generated)),
        np.arange(len(real)),
        nearest,
    )


def by_definition(generated, real, k):
    """Eq. 1 to 3 of Kynkäänniemi et al. and eq. 3 and 4 of Naeem et al., by scikit-learn."""

    def radii(x):
        return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()[0][:, -1]  # itself left out

    apart = np.linalg.norm(real[:, None] - generated[None], axis=2)
    in_real = apart <= radii(real)[:, None]
    return {
        "precision": in_real.any(axis=0).mean(),
        "recall": (apart <= radii(generated)).any(axis=1).mean(),
        "density": in_real.sum() / (k * len(generated)),
        "coverage": in_real.any(axis=1).mean(),
    }


@pytest.mark.parametrize(("n", "m", "k"), [(60, 60, 3), (37, 80, 1), (45, 20, 5)])
def test_figures_agree_with_their_definition_across_blocks(monkeypatch, n, m, k):
    for module in (rows, manifold):
        monkeypatch.setattr(module, "BLOCK", 16)
    rng = np.random.default_rng(n)
    generated, real = rng.normal(0.4, 0.8, (n, 4)), rng.normal(size=(m, 4))
    assert metrics(generated, real, k) == pytest.approx(by_definition(generated, real, k))


def test_figures_agree_with_prdc():
    compute = pytest.importorskip("prdc").compute_prdc
    rng = np.random.default_rng(0)
    generated, real = rng.normal(0.3, 0.9, (150, 6)), rng.normal(size=(150, 6))
    assert metrics(generated, real, 5) == pytest.approx(compute(real, generated, 5))


def test_images_of_one_distribution_have_the_published_expectations():
    """Naeem et al., lemma 1 and 2: density 1, coverage 1 - (m-1)...(m-k) / ((n+m-1)...(n+m-k))."""
    rng = np.random.default_rng(1)
    n, m, k = 80, 60, 3
    found = [metrics(rng.normal(size=(n, 2)), rng.normal(size=(m, 2)), k) for _ in range(60)]
    factors = np.arange(1, k + 1)
    expected = 1 - np.prod((m - factors) / (n + m - factors))
    for name, value in (("density", 1.0), ("coverage", expected)):
        each = np.array([f[name] for f in found])
        assert abs(each.mean() - value) < 3 * each.std() / np.sqrt(len(each))
        assert each.std() / np.sqrt(len(each)) < 0.03


def test_which_input_is_real_and_which_generated():
    rng = np.random.default_rng(2)
    real = rng.normal(size=(200, 2))
    collapsed = 1e-3 * rng.normal(size=(200, 2))  # plausible, and all alike
    found = metrics(collapsed, real)
    assert found["precision"] == 1
    assert found["recall"] < 0.05
    assert found["coverage"] < 0.2
    swapped = metrics(real, collapsed)
    assert swapped["recall"] == 1
    assert swapped["precision"] < 0.05


def test_copies_are_inside_balls_of_no_radius():
    rng = np.random.default_rng(3)
    x = np.repeat(1e3 + rng.normal(size=(9, 20)).astype(np.float32), 5, axis=0)
    found = metrics(x, x)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["density"] == pytest.approx(5 / 3)
    assert (squared_distances(x[:5], x[:5]) == 0).all()


def test_a_common_offset_changes_nothing():
    x, y = np.random.default_rng(5).normal(size=(2, 200, 3))
    assert metrics(x + 2.0**26, y + 2.0**26) == metrics(x, y)


def test_batches_change_nothing():
    x, y = np.random.default_rng(4).normal(size=(2, 300, 3)).astype(np.float32)
    assert metrics(x, y, sizes=(1,)) == metrics(x, y, sizes=(300,))


def test_too_few_images_are_refused():
    with pytest.raises(TooFewError, match="3 generated and 9 real images were given for neighbour"):
        metrics(np.ones((3, 2)), np.ones((9, 2)))
