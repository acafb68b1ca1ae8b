import hashlib
import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from accelkit.data import shards
from accelkit.data.digits import digits
from accelkit.data.sources import open_source
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.metrics import references
from accelkit.metrics.extractors import open_extractor
from accelkit.metrics.features import FeatureExtractor
from accelkit.metrics.frechet import Gaussian
from accelkit.metrics.references import open_reference


class Corners(FeatureExtractor):
    """Features of three values at each of two corners; it counts the images."""

    name, version, sha256, dim, spatial_dim, size, resize = "corners", "1", "c" * 64, 6, 3, None, ""

    def __init__(self, spatial=True):
        self.seen = 0
        if not spatial:
            self.spatial_dim = None

    def run(self, images):
        self.seen += len(images)
        corners = torch.from_numpy(images[:, [0, -1], [0, -1]].reshape(len(images), 6)).float()
        return {"pooled": corners} | ({"spatial": corners[:, :3]} if self.spatial_dim else {})


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, pictures):
    (tmp_path / "set").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "set" / f"{i:03d}.png")
    return tmp_path / "set"


def corners_of(pictures):
    return Corners().extract(pictures)["pooled"].astype(np.float64)


def assert_moments_of(gaussian, rows):
    np.testing.assert_allclose(gaussian.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.root @ gaussian.root, np.cov(rows.T), rtol=1e-9, atol=1e-9)


def rows_of(reference):
    return np.concatenate([batch["pooled"] for batch in reference.batches()])


def test_a_folder_and_a_zip_of_images_give_their_features(tmp_path, folder, pictures):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, path.name)
    expected = corners_of(pictures)
    fingerprint = open_source(folder).fingerprint
    for spec, name in ((folder, folder), (str(archive), archive), (open_source(folder), folder)):
        found = open_reference(spec, Corners(), 8, cache_dir=tmp_path / "cache")
        np.testing.assert_array_equal(rows_of(found), expected)
        assert_moments_of(found.pooled, expected)
        assert_moments_of(found.spatial, expected[:, :3])
        kept = {"name": str(name), "fingerprint": fingerprint}
        assert found.record() == {**kept, "kind": "images", "n": 30}


def test_the_digits_are_a_reference(tmp_path):
    extractor = open_extractor("digits")
    found = open_reference("digits", extractor, 32, cache_dir=tmp_path)
    expected = extractor.extract(digits()[0])
    np.testing.assert_allclose(rows_of(found), expected["pooled"], rtol=1e-3, atol=1e-4)
    assert found.n == 1797
    assert found.spatial.mean.shape == (256,)
    spatial = expected["spatial"].astype(np.float64)
    np.testing.assert_allclose(found.spatial.mean, spatial.mean(axis=0), rtol=1e-3, atol=1e-4)
    with pytest.raises(AccelkitError, match="takes images of 32x32, these are 64x64"):
        open_reference("digits", extractor, 64, cache_dir=tmp_path)


def test_features_are_extracted_once(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 12)  # so that there are three files
    monkeypatch.setattr(references, "BATCH", 12)
    monkeypatch.setenv("ACCELKIT_CACHE", str(tmp_path / "kept"))
    done = []
    first, again = Corners(), Corners()
    made = open_reference(folder, first, 8, on_images=lambda *counts: done.append(counts))
    found = open_reference(folder, again, 8)
    assert (first.seen, again.seen) == (30, 0)
    assert done[-1] == (30, 30)
    assert len(list((tmp_path / "kept" / "features").glob("*/*.safetensors"))) == 4
    np.testing.assert_array_equal(rows_of(made), rows_of(found))
    np.testing.assert_array_equal(made.pooled.root, found.pooled.root)

    other = Corners()
    other.sha256 = "d" * 64
    open_reference(folder, other, 8)
    open_reference(folder, again, 4)
    assert (other.seen, again.seen) == (30, 30)


def test_a_broken_cache_is_made_again(tmp_path, folder, pictures):
    open_reference(folder, Corners(), 8, cache_dir=tmp_path / "cache")
    for name in ("moments.safetensors", "shard-00000.safetensors"):
        (victim,) = (tmp_path / "cache").glob(f"*/{name}")
        victim.write_bytes(victim.read_bytes()[:-9])
        with pytest.warns(AccelkitWarning, match="the cached features .* are broken"):
            found = open_reference(folder, Corners(), 8, cache_dir=tmp_path / "cache")
        np.testing.assert_array_equal(rows_of(found), corners_of(pictures))


@pytest.mark.parametrize("name", ["moments.safetensors", "shard-00000.safetensors", "index.json"])
def test_a_flipped_bit_in_the_cache_is_noticed(tmp_path, folder, pictures, name):
    open_reference(folder, Corners(), 8, cache_dir=tmp_path / "cache")
    (victim,) = (tmp_path / "cache").glob(f"*/{name}")
    for place in (0.3, 0.6, 1.0):
        content = bytearray(victim.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        victim.unlink()
        victim.write_bytes(content)
        with pytest.warns(AccelkitWarning, match="the cached features .* are broken"):
            found = open_reference(folder, Corners(), 8, cache_dir=tmp_path / "cache")
        assert_moments_of(found.pooled, corners_of(pictures))
        np.testing.assert_array_equal(rows_of(found), corners_of(pictures))


def test_images_that_cannot_be_read_are_named_or_passed_over(tmp_path, folder, pictures):
    (folder / "007.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(AccelkitError, match=r"007\.png .*--skip-bad"):
            open_reference(folder, Corners(), 8, cache_dir=tmp_path / "cache")
        tolerant = open_source(folder, skip_bad=True)
        found = open_reference(tolerant, Corners(), 8, cache_dir=tmp_path / "cache")
        assert found.n == 29
        np.testing.assert_array_equal(rows_of(found), corners_of(np.delete(pictures, 7, axis=0)))


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def statistics(rows, names=("mu", "sigma")):
    return dict(zip(names, (rows.mean(axis=0), np.cov(rows.T)), strict=True))


def test_statistics_as_adm_and_pytorch_fid_write_them(tmp_path, pictures):
    rows = corners_of(pictures)
    spatial = statistics(rows[:, 3:], ("mu_s", "sigma_s"))
    path = save(tmp_path / "a.npz", **statistics(rows))
    found = open_reference(path, Corners(), 8)
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    kept = {"name": str(path), "fingerprint": fingerprint}
    assert found.record() == {**kept, "kind": "statistics", "n": None}
    assert_moments_of(found.pooled, rows)
    assert found.spatial is found.batches is None

    path = save(tmp_path / "b.npz", **statistics(rows), **spatial)
    assert_moments_of(open_reference(path, Corners(), 8).spatial, rows[:, 3:])
    assert open_reference(path, Corners(spatial=False), 8).spatial is None


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_images_in_an_npz(tmp_path, pictures, writer, monkeypatch):
    monkeypatch.setattr(references, "BATCH", 12)
    path, cache = tmp_path / "c.npz", tmp_path / "cache"
    writer(path, arr_0=pictures, arr_1=np.arange(30))
    rows = corners_of(pictures)
    found = open_reference(path, Corners(), 8, cache_dir=cache)
    assert (found.kind, found.n) == ("images", 30)
    np.testing.assert_array_equal(rows_of(found), rows)
    assert_moments_of(found.pooled, rows)
    assert_moments_of(found.spatial, rows[:, :3])


def test_a_reference_batch_of_adm_has_statistics_of_all_and_images_of_some(tmp_path, pictures):
    rows = corners_of(pictures)
    path = save(tmp_path / "VIRTUAL.npz", arr_0=pictures[:10], **statistics(rows))
    found = open_reference(path, Corners(), 8, cache_dir=tmp_path / "cache")
    assert (found.kind, found.n) == ("statistics", 10)
    assert_moments_of(found.pooled, rows)
    assert found.spatial is None
    np.testing.assert_array_equal(rows_of(found), rows[:10])


def test_references_of_the_wrong_size_are_refused(tmp_path, pictures):
    rows = corners_of(pictures)
    wide = save(tmp_path / "wide.npz", **statistics(np.tile(rows, 2)))
    with pytest.raises(AccelkitError, match=r"wide.npz have shapes \(12,\) .* features \(6,\)"):
        open_reference(wide, Corners(), 8)
    odd = save(tmp_path / "odd.npz", **{**statistics(rows), "sigma": np.eye(5)})
    with pytest.raises(AccelkitError, match=r"\(6,\) and \(5, 5\), the extractor's .*\(6, 6\)"):
        open_reference(odd, Corners(), 8)
    spatial = statistics(rows, ("mu_s", "sigma_s"))
    path = save(tmp_path / "s.npz", **statistics(rows), **spatial)
    with pytest.raises(AccelkitError, match=r"mu_s and sigma_s .* \(6,\) .* features \(3,\)"):
        open_reference(path, Corners(), 8)
    images = save(tmp_path / "images.npz", arr_0=pictures)
    with pytest.raises(AccelkitError, match=r"images.npz are 8x8, the generated ones 16x16"):
        open_reference(images, Corners(), 16)


def test_files_that_are_no_reference_are_refused(tmp_path, pictures):
    rows = corners_of(pictures)

    def refused(path, words):
        with pytest.raises(AccelkitError, match=words):
            open_reference(path, Corners(), 8, cache_dir=tmp_path / "cache")

    refused(tmp_path / "gone.npz", "no reference at .*gone.npz")
    refused(tmp_path / "gone", "no data at .*gone")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no archive")
    refused(broken, r"cannot read the reference .*broken.npz")
    whole = save(tmp_path / "whole.npz", **statistics(rows)).read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    refused(broken, r"cannot read the reference .*broken.npz")
    refused(save(tmp_path / "other.npz", x=rows), "neither statistics .* nor images")
    text = save(tmp_path / "text.npz", mu=np.array(["a"] * 6), sigma=np.eye(6))
    refused(text, "cannot read the reference .*text.npz")
    pickled = save(tmp_path / "pickled.npz", mu=np.array([{}], dtype=object), sigma=np.eye(6))
    refused(pickled, "cannot read the reference .*pickled.npz")
    negative = save(tmp_path / "negative.npz", mu=np.zeros(6), sigma=-np.eye(6))
    refused(negative, "sigma in .*negative.npz has the eigenvalue -1")
    for wrong in (pictures.astype(np.float32), pictures[..., 0], pictures[:0]):
        refused(
            save(tmp_path / "wrong.npz", arr_0=wrong), r"wrong.npz is .* expected images: uint8"
        )
    refused(save(tmp_path / "one.npz", arr_0=pictures[:1]), "takes at least 2 images, this has 1")
    # cut inside the images' data, and made an archive again
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pictures)
    with zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue()[:-5000])
    refused(tmp_path / "cut.npz", "cannot read the reference .*cut.npz")
    assert not list((tmp_path / "cache").glob("partial-*"))


def test_moments_survive_the_way_through_a_file(tmp_path, folder, pictures):
    made = open_reference(folder, Corners(), 8, cache_dir=tmp_path / "cache")
    exact = Gaussian.of(*statistics(corners_of(pictures)).values())
    assert made.pooled.distance(exact) < 1e-8
