import hashlib
import json
import os
from importlib import resources

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from accelkit.data.digits import digits
from accelkit.errors import AccelkitError
from accelkit.metrics import extractors
from accelkit.metrics.digit_classifier import DigitClassifier, to_grey
from accelkit.metrics.extractors import open_extractor
from accelkit.metrics.features import DigitFeatures
from accelkit.metrics.frechet import Gaussian, Moments
from benchmarks import digit_classifier as training
from benchmarks.digit_classifier import main, split

SHIPPED = resources.files("accelkit") / "assets" / "digit_features.safetensors"
HELD_OUT_HEAD = [3, 7, 13, 19, 36, 38, 43, 48]
HELD_OUT_SUM = 311827


@pytest.fixture(scope="module")
def images():
    return digits()[0]


@pytest.fixture(scope="module")
def features(images):
    return open_extractor("digits")(images)


def distance(x, y):
    a, b = Moments(), Moments()
    a.update(x)
    b.update(y)
    return Gaussian.of(a.mean, a.cov).distance(Gaussian.of(b.mean, b.cov))


def read_metadata(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["accelkit"])


def test_the_shipped_file_is_what_the_extractor_reports():
    found = open_extractor("digits")
    assert (found.name, found.version, found.dim) == ("digit-cnn-v1", "1", 64)
    assert found.sha256 == hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    metadata = read_metadata(SHIPPED)
    assert (metadata["name"], metadata["version"]) == (found.name, found.version)
    weights = load_file(SHIPPED)
    assert sum(w.numel() for w in weights.values()) <= 150_000
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert SHIPPED.stat().st_size <= 600_000


def test_held_out_accuracy_is_the_recorded_one(images):
    labels = digits()[1]
    metadata = read_metadata(SHIPPED)
    train, held_out = split(labels, metadata["split"]["seed"])
    assert (len(train), len(held_out)) == (
        metadata["split"]["train"],
        metadata["split"]["held_out"],
    )
    guess = open_extractor("digits").extract(images[held_out])["probabilities"].argmax(axis=1)
    accuracy = (guess == labels[held_out]).mean()
    assert accuracy >= 0.97
    assert accuracy == pytest.approx(metadata["accuracy"], abs=1.5 / len(held_out))


def test_split_is_stratified_disjoint_and_complete():
    labels = digits()[1]
    train, held_out = split(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held_out])), np.arange(1797))
    share = np.bincount(labels[held_out]) / np.bincount(labels)
    assert np.abs(share - 0.2).max() < 0.003
    assert not np.array_equal(split(labels, seed=1)[1], held_out)
    # the split must never change, because the shipped network has not seen these images
    assert held_out[:8].tolist() == HELD_OUT_HEAD
    assert int(held_out.sum()) == HELD_OUT_SUM


def test_features_equal_a_float64_pass_one_image_at_a_time(images, features):
    model = DigitClassifier()
    model.load_state_dict(load_file(SHIPPED))
    model.double().eval()
    grey = images[:24].astype(np.float64).mean(axis=-1) / 127.5 - 1
    with torch.no_grad():
        exact = torch.cat([model.features(torch.from_numpy(g)[None, None]) for g in grey])
        probabilities = model(torch.from_numpy(grey)[:, None]).softmax(dim=1)
    np.testing.assert_allclose(features[:24], exact.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        open_extractor("digits").extract(images[:24])["probabilities"],
        probabilities.numpy(),
        atol=1e-5,
    )


@pytest.mark.parametrize("size", [1, 256, 257])
def test_features_do_not_depend_on_the_batch(images, features, size):
    part = open_extractor("digits")(images[200 : 200 + size])
    assert part.dtype == np.float32
    assert part.shape == (size, 64)
    np.testing.assert_allclose(part, features[200 : 200 + size], rtol=1e-4, atol=1e-5)


def test_extraction_is_deterministic_and_does_not_change_images(images, features):
    before = images.copy()
    np.testing.assert_array_equal(open_extractor("digits")(images), features)
    np.testing.assert_array_equal(images, before)
    assert open_extractor("digits")(images[:0]).shape == (0, 64)


def test_colour_counts_as_its_mean(images):
    grey = images[:5] // 3
    for channel in range(3):
        tinted = np.zeros_like(grey)
        tinted[..., channel] = grey[..., channel] * 3
        np.testing.assert_allclose(
            open_extractor("digits")(tinted), open_extractor("digits")(grey), rtol=1e-4, atol=1e-5
        )


def test_scale_of_the_distance(images, features):
    """Between real halves it is below 1.5; the unit is the deviation of the training digits."""
    train, _ = split(digits()[1])
    np.testing.assert_allclose(features[train].var(axis=0, ddof=1), 1, rtol=1e-3)
    order = np.random.default_rng(0).permutation(len(images))
    floor = distance(features[order[:898]], features[order[898:]])
    assert 0 < floor < 1.5
    noise = np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)
    assert distance(features, open_extractor("digits")(noise)) > 100 * floor


def test_distance_grows_with_the_damage(images, features):
    some = images[::4]
    unit = np.random.default_rng(0).normal(size=some.shape)
    found = [
        distance(
            features, open_extractor("digits")(np.clip(some + s * unit, 0, 255).astype(np.uint8))
        )
        for s in (5, 25, 100)
    ]
    assert found == sorted(found)
    assert found[-1] > 50
    labels = digits()[1]
    one_class, nine_classes = features[labels == 3], features[labels != 7]
    assert distance(features, one_class) > 10 * distance(features, nine_classes) > 5


def test_wrong_images_are_refused(images):
    with pytest.raises(TypeError, match="images are float32, expected uint8"):
        open_extractor("digits")(images[:2].astype(np.float32))
    with pytest.raises(TypeError, match="images are a Tensor"):
        open_extractor("digits")(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    for wrong in ((32, 32, 3), (2, 3, 32, 32), (2, 32, 32, 1), (2, 64, 64, 3)):
        with pytest.raises(AccelkitError, match=r"expected \(n, 32, 32, 3\).* 32x32"):
            open_extractor("digits")(np.zeros(wrong, dtype=np.uint8))


def test_spatial_features_are_the_third_convolution_before_its_activation(images):
    model = DigitClassifier()
    model.load_state_dict(load_file(SHIPPED))
    seen = []
    model.convs[4].register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.no_grad():
        model(to_grey(images[:6]))
    found = open_extractor("digits").extract(images[:6])["spatial"].reshape(6, 8, 8, 4)
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), seen[0][:, :4].numpy(), rtol=1e-5)
    assert (found.reshape(6, -1).shape[1],) == (open_extractor("digits").spatial_dim,)
    spread = open_extractor("digits").extract(images)["spatial"].std(axis=0).reshape(64, 4)
    assert np.median(spread, axis=0).min() > 1  # no channel is dead


def test_unknown_extractor_names_the_known():
    with pytest.raises(AccelkitError, match=r"'inception9000'.*choose one of: digits"):
        open_extractor("inception9000")


def test_another_hash_than_the_recorded_is_refused():
    found = open_extractor("digits")
    assert open_extractor("digits", found.sha256.upper()) is found
    with pytest.raises(AccelkitError, match=r"have SHA-256 7bef49de328d…, those recorded 0{12}…"):
        open_extractor("digits", "0" * 64)
    assert found.record() == {
        "name": "digit-cnn-v1",
        "version": "1",
        "sha256": found.sha256,
        "dim": 64,
        "resize": "none",
    }


def test_weights_of_another_hash_are_not_loaded(monkeypatch):
    def load():
        raise AssertionError("loaded")

    monkeypatch.setattr(extractors, "_digits", load)
    with pytest.raises(AccelkitError, match=r"those recorded 0{12}…"):
        open_extractor("digits", "0" * 64)


def test_damaged_and_missing_weights_are_refused(tmp_path):
    data = bytearray(SHIPPED.read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "weights.safetensors"
    damaged.write_bytes(data)
    with pytest.raises(AccelkitError, match=r"have SHA-256 .* reinstall"):
        DigitFeatures(damaged)
    with pytest.raises(AccelkitError, match="missing; reinstall"):
        DigitFeatures(tmp_path / "none.safetensors")


def test_unit_variance_does_not_change_the_logits(images):
    grey = to_grey(images[:200])
    torch.manual_seed(0)
    model = DigitClassifier()
    with torch.no_grad():
        before = model(grey)
        training.set_unit_variance(model, grey)
        torch.testing.assert_close(model(grey), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.features(grey).var(dim=0), torch.ones(64))


def test_training_lowers_the_loss_and_repeats(images):
    labels = torch.from_numpy(digits()[1][:320].copy())
    grey = to_grey(images[:320])
    state = torch.random.get_rng_state()
    losses: list[float] = []
    runs = [
        training.train(grey, labels, seed=3, epochs=3, on_epoch=lambda _, loss: losses.append(loss))
        for _ in range(2)
    ]
    assert losses[2] < 0.9 * losses[0]
    assert not runs[0].training
    for first, second in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(first, second)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_command_writes_weights_with_their_origin(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    main(["-o", str(path), "--epochs", "1", "--seed", "5"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    metadata = read_metadata(path)
    assert metadata["accuracy"] > 0.15
    assert f"held-out accuracy {metadata['accuracy']:.4f}" in capsys.readouterr().out
    del metadata["accuracy"]
    assert metadata == {
        "name": "digit-cnn-v1",
        "version": "1",
        "seed": 5,
        "epochs": 1,
        "split": {"seed": 0, "train": 1438, "held_out": 359},
    }
    DigitClassifier().load_state_dict(load_file(path))

    before = path.read_bytes()
    with pytest.raises(SystemExit) as exit_:
        main(["-o", str(path), "--epochs", "1"])
    assert exit_.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_failed_write_keeps_the_old_file_and_the_next_replaces_it(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(AccelkitError, match=r"cannot write .*disk full"):
            training.write_weights(path, DigitClassifier(), {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"
    training.write_weights(path, DigitClassifier(), {"seed": 1})
    assert read_metadata(path) == {"seed": 1}
