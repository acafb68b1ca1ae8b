import numpy as np
import pytest
import torch
from feature_rows import batches_of

from accelkit.errors import AccelkitError
from accelkit.metrics import inception_score as module
from accelkit.metrics.inception_score import inception_score
from accelkit.metrics.rows import TooFewError


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def score(p, period=1, **options):
    return inception_score(batches_of(probabilities=p, **options), len(p), period)


def test_uncertain_classes_score_1_and_certain_balanced_ones_their_number():
    assert score(np.full((10_000, 8), 1 / 8)) == pytest.approx((1, 0))
    assert score(np.tile(np.eye(8), (1250, 1))) == pytest.approx((8, 0))


def test_there_is_a_run_for_every_5000_images_as_in_adms_suite():
    """As in ADM's loop over ``range(0, n, 5000)``, if that divides the number of images."""
    rng = np.random.default_rng(5)
    for n in (2000, 5000, 15_000):
        p = softmax(rng.normal(0, 2, (n, 6)))
        scores = []
        for i in range(0, n, 5000):
            part = p[i : i + 5000]
            kl = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
            scores.append(np.exp(kl.sum(axis=1).mean()))
        mean, deviation = score(p)
        assert mean == pytest.approx(np.mean(scores), rel=1e-12)
        assert deviation == (pytest.approx(np.std(scores), rel=1e-9) if n > 5000 else None)


def test_certain_classes_that_go_round_score_their_number_with_few_images():
    """Ten runs of 1,000 images of 500 classes would have 100 classes each."""
    assert score(np.tile(np.eye(500), (2, 1)), period=500) == (pytest.approx(500), None)


def test_runs_begin_with_a_round_of_the_classes(monkeypatch):
    monkeypatch.setattr(module, "SPLIT_IMAGES", 500)
    p = np.tile(np.eye(70), (15, 1))  # 1,050 images: runs of 525 would cut the eighth round
    assert score(p, period=70) == pytest.approx((70, 0))
    assert score(p)[0] < 69.9
    assert score(np.tile(np.eye(600), (2, 1))[:1100], period=600)[1] is None


def test_two_classes_agree_with_the_closed_form():
    """Half of the images have p, half 1 - p: exp of log 2 minus the binary entropy."""
    p = np.tile([[0.9, 0.1], [0.1, 0.9]], (5000, 1))
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    assert score(p) == pytest.approx((np.exp(np.log(2) - entropy), 0))


def test_score_is_that_of_torchmetrics(monkeypatch):
    """Without its shuffling, its ten chunks are the same if ten divides the number."""
    inception = pytest.importorskip("torchmetrics.image.inception")
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (2340, 12)))
    monkeypatch.setattr(module, "SPLIT_IMAGES", 234)
    metric = inception.InceptionScore(feature=torch.nn.Identity(), splits=10)
    metric.features = [logits]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", torch.arange)
        mean, deviation = metric.compute()
    found = score(softmax(logits.numpy()))
    assert found[0] == pytest.approx(mean.item(), rel=1e-12)
    assert found[1] == pytest.approx(deviation.item() * np.sqrt(9 / 10), rel=1e-9)


def test_batches_do_not_change_a_bit(monkeypatch):
    monkeypatch.setattr(module, "SPLIT_IMAGES", 234)
    p = softmax(np.random.default_rng(1).normal(size=(2345, 7))).astype(np.float32)
    assert score(p, sizes=(1,)) == score(p, sizes=(2345,)) == score(p, sizes=(999, 2))


def test_too_few_images_and_what_is_no_distribution_are_refused():
    with pytest.raises(TooFewError, match="at least 2 images, got 1"):
        score(np.full((1, 2), 0.5))
    for bad in (np.full((10, 2), 0.6), np.tile([1.5, -0.5], (10, 1)), np.full((10, 2), np.nan)):
        with pytest.raises(AccelkitError, match="do not sum to 1"):
            score(bad)
