import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from feature_rows import batches_of, gaussian_of, reference_of
from scipy import stats

from accelkit.data.digits import digits
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.metrics.extractors import open_extractor
from accelkit.metrics.frechet import Gaussian
from accelkit.metrics.quality import distinguishable, jackknife_error, measure
from accelkit.metrics.references import Reference, open_reference

FIGURES = {
    "images", "fid", "fid_stderr", "fid_jackknife", "sfid", "inception_score",
    "inception_score_std", "kid", "kid_std", "precision", "recall", "density", "coverage",
    "manifold_images", "missing",
}  # fmt: skip


@pytest.fixture(scope="module")
def sets():
    """Rows of 1,234 generated and 700 real images."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (1234, 5))
    generated = {
        "pooled": rng.normal(0.2, 1.1, (1234, 6)).astype(np.float32),
        "spatial": rng.normal(0.1, 0.9, (1234, 9)).astype(np.float32),
        "probabilities": (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)),
    }
    return generated, rng.normal(size=(700, 6)), rng.normal(size=(700, 9))


def by_square_root(x, y):
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return ((x.mean(axis=0) - y.mean(axis=0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)


def test_every_figure_is_there_and_plain(sets):
    generated, pooled, spatial = sets
    found = measure(batches_of(**generated), reference_of(pooled, spatial))
    assert set(found) == FIGURES
    assert set(found["missing"]) == {"inception_score_std"}
    assert "1,234 images make one run" in found["missing"]["inception_score_std"]
    assert found["images"] == 1234
    assert found["manifold_images"] == 700
    assert json.loads(json.dumps(found)) == found
    assert found["fid"] == pytest.approx(by_square_root(generated["pooled"], pooled), abs=1e-6)
    assert found["sfid"] == pytest.approx(by_square_root(generated["spatial"], spatial), abs=1e-6)


def test_fid_is_that_of_torchmetrics(sets):
    compute = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    generated, pooled, _ = sets
    moments = [
        torch.from_numpy(m)
        for x in (pooled, generated["pooled"].astype(np.float64))
        for m in (x.mean(axis=0), np.cov(x.T))
    ]
    found = measure(batches_of(pooled=generated["pooled"]), reference_of(pooled))["fid"]
    assert found == pytest.approx(compute(*moments).item(), abs=1e-6)


def test_fid_precision_and_recall_are_those_of_torch_fidelity(sets):
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    generated, real = sets[0]["pooled"].astype(np.float64)[:700], sets[1]
    found = measure(batches_of(pooled=generated), reference_of(real))
    x, y = torch.from_numpy(generated), torch.from_numpy(real)
    moments = [fid.fid_features_to_statistics(features) for features in (x, y)]
    expected = fid.fid_statistics_to_metric(*moments, verbose=False)
    assert found["fid"] == pytest.approx(expected[fid.KEY_METRIC_FID], abs=1e-6)
    precision, recall = prc.calculate_precision_recall_full(x, y)
    assert (found["precision"], found["recall"]) == pytest.approx((precision, recall))


def test_batches_do_not_change_a_bit(sets):
    generated, pooled, spatial = sets
    some = {name: rows[:300] for name, rows in generated.items()}
    reference = reference_of(pooled[:200], spatial[:200])
    first, *others = [
        measure(batches_of(sizes, **some), reference) for sizes in ((1,), (300,), (5, 70))
    ]
    assert all(other == first for other in others)


def test_the_seed_draws_subsets_and_manifold_images(sets):
    generated, pooled, _ = sets
    batches, reference = batches_of(pooled=generated["pooled"]), reference_of(pooled)
    found = [measure(batches, reference, seed=seed, manifold_images=100) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0]["fid"] == found[2]["fid"]
    for name in ("kid", "density"):
        assert found[0][name] != found[2][name]
    assert found[0]["manifold_images"] == 100


@pytest.mark.parametrize(("period", "rounds"), [(1, 1232), (7, 176), (300, 4)])
def test_jackknife_leaves_out_rounds_of_images(sets, period, rounds):
    """All but the last few of 1,234 images are in one of four groups."""
    generated, pooled, _ = sets
    x = generated["pooled"]
    found = measure(batches_of(pooled=x), reference_of(pooled), groups=4, period=period)
    groups = np.arange(1234) // period % 4
    groups[rounds * period :] = 4
    without = [by_square_root(x[groups != g], pooled) for g in range(4)]
    assert found["fid_jackknife"] == pytest.approx(without, abs=1e-6)
    assert found["fid"] == pytest.approx(by_square_root(x, pooled), abs=1e-6)
    deviations = np.array(without) - np.mean(without)
    expected = np.sqrt(3 / 4 * (deviations**2).sum())
    assert found["fid_stderr"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("n", "period", "groups"),
    [(5000, 1000, 5), (50_000, 1000, 10), (500, 10, 10), (500, 1, 10), (1300, 100, 6), (25, 1, 8)],
)
def test_groups_are_of_whole_rounds_and_hold_nine_images_of_ten(n, period, groups):
    x = np.random.default_rng(n).normal(size=(n, 2))
    found = measure(batches_of(pooled=x), _statistics(2), period=period)
    assert len(found["fid_jackknife"]) == groups


@pytest.mark.parametrize(
    ("n", "period", "words"),
    [
        (500, 1000, r"^500 images hold only 0 whole rounds of 1,000 classes; .* 2,000 images$"),
        (1999, 1000, r"^1,999 images hold only 1 whole rounds of 1,000 classes"),
        (2999, 1000, r"^2,999 images .* 2 whole rounds .* a part of one; .* 2,000 or 3,000 images"),
        (19, 1, r"^10 groups of at least 2 take more than 19 images$"),
    ],
)
def test_too_few_rounds_have_no_standard_error(n, period, words):
    x = np.random.default_rng(n).normal(size=(n, 2))
    found = measure(batches_of(pooled=x), _statistics(2), period=period)
    assert found["fid_stderr"] is found["fid_jackknife"] is None
    for name in ("fid_stderr", "fid_jackknife"):
        assert re.search(words, found["missing"][name])
    assert not distinguishable(found, found)


def test_jackknife_error_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).normal(size=20)
    without = [np.delete(x, i).mean() for i in range(20)]
    assert jackknife_error(without) == pytest.approx(x.std(ddof=1) / np.sqrt(20))


def test_standard_error_is_the_spread_over_repeated_draws():
    rng = np.random.default_rng(1)
    reference = _statistics(4)
    found = [measure(batches_of(pooled=rng.normal(0.3, 1, (400, 4))), reference) for _ in range(80)]
    spread = np.std([f["fid"] for f in found], ddof=1)
    assert np.mean([f["fid_stderr"] for f in found]) == pytest.approx(spread, rel=0.25)


def test_classes_going_round_do_not_inflate_the_error():
    """With ten balanced classes far apart the FID hardly varies, and its error is small too."""
    rng = np.random.default_rng(2)
    centres = 5 * rng.normal(size=(10, 3))
    draws = [np.tile(centres, (40, 1)) + rng.normal(size=(400, 3)) for _ in range(30)]
    reference = reference_of(np.tile(centres, (400, 1)) + rng.normal(size=(4000, 3)))
    statistics = Reference("s", "0", "statistics", None, reference.pooled, None, None)
    found = [measure(batches_of(pooled=x), statistics, period=10) for x in draws]
    spread = np.std([f["fid"] for f in found], ddof=1)
    assert np.mean([f["fid_stderr"] for f in found]) == pytest.approx(spread, rel=0.5)


@pytest.mark.parametrize("n", [500, 1000])
def test_the_error_of_many_classes_is_the_spread_over_seeds(n):
    """There are 100 classes far apart, in ten groups, or in five as 500 images have five rounds."""
    rng = np.random.default_rng(4)
    centres = 5 * rng.normal(size=(100, 4))
    real = centres[np.arange(20_000) % 100] + rng.normal(size=(20_000, 4))
    statistics = Reference("s", "0", "statistics", None, gaussian_of(real), None, None)
    found = [
        measure(
            batches_of(pooled=centres[np.arange(n) % 100] + 0.3 + 1.5 * rng.normal(size=(n, 4))),
            statistics,
            period=100,
        )
        for _ in range(60)
    ]
    spread = np.std([f["fid"] for f in found], ddof=1)
    errors = np.array([f["fid_stderr"] for f in found])
    assert {len(f["fid_jackknife"]) for f in found} == {n // 100}
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(spread, rel=0.3)


def test_damaged_digits_are_worse_in_every_figure(tmp_path):
    extractor = open_extractor("digits")
    reference = open_reference("digits", extractor, 32, cache_dir=tmp_path)
    images, labels = digits()
    noise = 60 * np.random.default_rng(0).normal(size=images.shape)
    damaged = np.clip(images + noise, 0, 255).astype(np.uint8)
    good, bad, few = (
        measure(batches_of(**extractor.extract(x)), reference, manifold_images=400)
        for x in (images[:600], damaged[:600], images[labels < 3])
    )
    assert set(good["missing"]) == {"inception_score_std"}
    for name, factor in (("fid", 20), ("sfid", 2), ("kid", 20)):
        assert bad[name] > factor * abs(good[name])
    for name in ("inception_score", "precision", "density", "coverage"):
        assert bad[name] < good[name]
    assert good["inception_score"] > 9
    assert few["inception_score"] == pytest.approx(3, abs=0.2)
    assert few["recall"] < good["recall"] - 0.3
    assert few["precision"] > 0.8
    assert distinguishable(good, bad)


def test_rows_that_share_their_noise_can_be_told_apart():
    """A shift smaller than the error of a row is visible only if the seeds are shared."""
    rng = np.random.default_rng(3)
    noise, other = rng.normal(size=(2, 1000, 4))
    reference = _statistics(4)
    a, b, c, d = (
        measure(batches_of(pooled=x), reference)
        for x in (noise + 0.2, noise + 0.22, other + 0.22, noise + 0.2 + 0.02 * other)
    )
    assert abs(a["fid"] - b["fid"]) < 2 * a["fid_stderr"]
    assert distinguishable(a, b)
    assert distinguishable(b, a)
    assert not distinguishable(a, a)
    assert not distinguishable(a, {**b, "fid_jackknife": None})
    assert not distinguishable(a, {**b, "images": 999})
    # by hand
    for x, y in ((a, b), (a, c), (a, d)):
        error = jackknife_error(np.subtract(x["fid_jackknife"], y["fid_jackknife"]))
        t = abs(x["fid"] - y["fid"]) / error
        assert distinguishable(x, y) == (2 * stats.t.sf(t, 9) < 0.05)


def test_fewer_images_than_features_warn_with_the_numbers(sets):
    generated, pooled, spatial = sets
    few = {name: rows[:8] for name, rows in generated.items()}
    with pytest.warns(AccelkitWarning, match=r"8 images are too few for the 9 dimensions of sfid"):
        measure(batches_of(**few), reference_of(pooled, spatial))
    few = {name: rows[:5] for name, rows in generated.items()}
    with pytest.warns(AccelkitWarning, match=r"5 images .* 6 dim.* of fid.* and the 9 dim.* sfid"):
        found = measure(batches_of(**few), reference_of(pooled, spatial))
    assert found["fid"] == pytest.approx(by_square_root(few["pooled"], pooled), abs=1e-4)


def test_a_reference_of_few_images_warns_with_its_number(sets):
    generated, pooled, spatial = sets
    reference = reference_of(pooled[:6], spatial[:6])
    words = (
        r"^the reference's 6 images are too few for the 6 dimensions of fid's features and the 9 "
        r"dimensions of sfid's features: compare"
    )
    with pytest.warns(AccelkitWarning, match=words):
        measure(batches_of(**generated), reference)
    few = {name: rows[:8] for name, rows in generated.items()}
    with pytest.warns(AccelkitWarning, match=r"8 images .* of sfid's features, the ref.* 6 images"):
        measure(batches_of(**few), reference)
    # ADM's batches hold statistics of a whole data set and some of its images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(batches_of(**generated), replace(reference, kind="statistics"))


@pytest.mark.filterwarnings("ignore::accelkit.errors.AccelkitWarning")
@pytest.mark.parametrize("kind", [
    "plain", "copies", "constant", "offset", "float16", "large float16", "singular", "overflow",
])  # fmt: skip
@pytest.mark.parametrize("n", [1, 2, 4, 45])
def test_every_figure_is_finite_or_null_with_a_reason(kind, n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(2, max(n, 2), 5)).astype(np.float32)
    if kind == "copies":
        x[:] = x[:, :1]
    elif kind == "constant":
        x[:] = 0.1
    elif kind == "offset":
        x = x.astype(np.float64) + 1e9
    elif kind == "float16":
        x = x.astype(np.float16)
    elif kind == "large float16":
        x = (3e4 + 100 * x).astype(np.float16)
    elif kind == "singular":
        x[..., 1:] = x[..., :1]
    elif kind == "overflow":
        x *= 1e30
    probabilities = np.eye(3, dtype=x.dtype)[np.arange(n) % 3]
    batches = batches_of(pooled=x[0, :n], spatial=x[0, :n, :3], probabilities=probabilities)
    found = measure(batches, reference_of(x[1].astype(np.float64), x[1, :, :3].astype(np.float64)))
    assert set(found) == FIGURES
    assert {name for name in found if found[name] is None} == set(found["missing"])
    assert all(found["missing"].values())
    values = [found[name] for name in FIGURES - {"missing"} if found[name] is not None]
    assert np.isfinite(np.hstack(values)).all()
    assert ("fid" in found["missing"]) == (n == 1)
    if kind in ("copies", "constant") and n > 3:
        assert found["fid"] == pytest.approx(np.square(x[0, 0] - x[1, 0]).sum(), rel=1e-5)


@pytest.mark.filterwarnings("ignore::accelkit.errors.AccelkitWarning")
def test_figures_that_cannot_be_computed_are_null_with_a_reason(sets):
    generated, pooled, spatial = sets
    statistics = Reference("s", "0", "statistics", None, gaussian_of(pooled), None, None)
    found = measure(batches_of(**generated), statistics)
    assert set(found) == FIGURES
    assert set(found["missing"]) == {
        "sfid", "inception_score_std", "kid", "kid_std", "precision", "recall", "density",
        "coverage", "manifold_images",
    }  # fmt: skip
    assert found["missing"]["kid"] == "the reference holds statistics alone, and no images"
    assert found["kid"] is found["kid_std"] is found["precision"] is found["sfid"] is None
    assert found["fid"] > 0

    reasons = {"spatial": "flat", "probabilities": "no classes"}
    one = {"pooled": generated["pooled"][:1]}
    found = measure(batches_of(**one), reference_of(pooled, spatial), missing=reasons)
    assert set(found) == FIGURES
    assert {name for name in found if found[name] is None} == FIGURES - {"images", "missing"}
    assert found["missing"]["inception_score"] == "no classes"
    assert "4 images a side, got 1 and 700" in found["missing"]["kid"]
    assert "1 generated and 1 real images" in found["missing"]["recall"]

    few = {name: rows[:19] for name, rows in generated.items() if name != "spatial"}
    found = measure(batches_of(**few), reference_of(pooled, spatial), missing=reasons)
    assert set(found["missing"]) == {"fid_stderr", "fid_jackknife", "sfid", "inception_score_std"}
    assert found["missing"]["sfid"] == "flat"
    assert found["fid_jackknife"] is None
    assert found["manifold_images"] == 19


def test_features_of_another_extractor_are_refused(sets):
    _, pooled, _ = sets
    with pytest.raises(AccelkitError, match=r"5 wide, the reference's 6; use one extractor"):
        measure(batches_of(pooled=np.ones((9, 5))), reference_of(pooled))
    with pytest.raises(AccelkitError, match="no generated images to measure"):
        measure(lambda: iter(()), reference_of(pooled))
    with pytest.raises(AccelkitError, match="at least 2 groups, got 1"):
        measure(batches_of(pooled=pooled), reference_of(pooled), groups=1)
    with pytest.raises(AccelkitError, match="at least 1 image, got a period of 0"):
        measure(batches_of(pooled=pooled), reference_of(pooled), period=0)


MEMORY = """
import numpy as np
from accelkit.metrics import kid
from accelkit.metrics.frechet import Gaussian
from accelkit.metrics.quality import measure
from accelkit.metrics.references import Reference

noise = np.random.default_rng(0).normal(size=(500, 256)).astype(np.float32)

def rows(n, shift):
    def batches():
        for start in range(0, n, 500):
            x = np.roll(noise, start, axis=1) + np.float32(shift)
            yield {"pooled": x, "spatial": x, "probabilities": np.full((500, 10), 0.1)}
    return batches

kid.SUBSETS = 20  # 10 are held at a time
gaussian = Gaussian.of(np.zeros(256), np.eye(256))
for n in (2_000, 50_000):
    reference = Reference("r", "0", "images", n, gaussian, gaussian, rows(n, 0.0))
    measure(rows(n, 0.1), reference, manifold_images=1000)
    print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_does_not_grow_with_the_number_of_images():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    small, large = map(int, done.stdout.split())
    assert large < 1.1 * small


def _statistics(d):
    """Return the exact standard Gaussian."""
    return Reference("g", "0", "statistics", None, Gaussian.of(np.zeros(d), np.eye(d)), None, None)
