import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from accelkit.errors import AccelkitError
from accelkit.metrics.extractors import open_extractor


class Inception(nn.Module):
    """The calls of StyleGAN3's Inception: features, probabilities, logits by default."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(12, 5)

    def forward(
        self, img: Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        if img.dtype != torch.uint8:
            raise ValueError("not uint8")
        x = nn.functional.interpolate(img.float(), size=[2, 2]) / 128 - 1
        x = x.flatten(1)
        if return_features:
            return x
        if no_output_bias:
            return nn.functional.linear(x, self.output.weight).softmax(dim=1)
        return self.output(x)


class Plain(nn.Module):
    def forward(self, img: Tensor) -> Tensor:
        return img.float().mean(dim=[2, 3])


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8 * 8 * 3, 4)

    def forward(self, img: Tensor) -> Tensor:
        return self.linear(img.float().flatten(1))


class Unpooled(nn.Module):
    def forward(self, img: Tensor) -> Tensor:
        return img.float().mean(dim=[2, 3], keepdim=True)


class Pair(nn.Module):
    def forward(self, img: Tensor) -> tuple[Tensor, Tensor]:
        return img.float(), img.float()


@pytest.fixture
def scripted(tmp_path):
    def write(module, name="net.pt"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = module()
        torch.jit.script(network).save(str(tmp_path / name))
        return network, tmp_path / name

    return write


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (150, 8, 10, 3), dtype=np.uint8)


def test_a_file_like_stylegan3s_gives_features_and_probabilities(scripted, images):
    network, path = scripted(Inception, "inception-2015-12-05.pt")
    extractor = open_extractor(path)
    assert (extractor.name, extractor.dim, extractor.size) == ("inception-2015-12-05", 12, None)
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    found = extractor.extract(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = network(x, return_features=True).numpy()
        probabilities = network(x, no_output_bias=True).numpy()
    np.testing.assert_allclose(found["pooled"], features, rtol=1e-6)
    np.testing.assert_allclose(found["probabilities"], probabilities, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(extractor(images), found["pooled"])
    assert set(found) == {"pooled", "probabilities"}
    assert extractor.missing == {"spatial": "a TorchScript file gives no spatial features"}


def test_any_other_file_gives_what_it_returns(scripted, images):
    extractor = open_extractor(str(scripted(Plain)[1]))
    found = extractor.extract(images)
    np.testing.assert_allclose(found["pooled"], images.mean(axis=(1, 2)), rtol=1e-5)
    assert set(found) == {"pooled"}
    assert extractor.missing["probabilities"] == "net.pt gives no probabilities of classes"


def test_a_file_for_one_size_is_tried_with_it(scripted, images):
    network, path = scripted(Small)
    found = open_extractor(path, image_size=8)(images[:, :, :8])
    with torch.no_grad():
        expected = network(torch.from_numpy(images[:, :, :8]).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(AccelkitError, match=r"net.pt does not map uint8 images of 299x299"):
        open_extractor(path)


def test_files_that_are_no_torchscript_are_refused(tmp_path, scripted):
    for name, write in (
        ("state.pt", lambda path: torch.save({"weight": torch.ones(3)}, path)),
        ("text.pt", lambda path: path.write_text("no network")),
        ("empty.pt", lambda path: path.write_bytes(b"")),
    ):
        write(tmp_path / name)
        with pytest.raises(AccelkitError, match=rf"{name} cannot be loaded as TorchScript"):
            open_extractor(tmp_path / name)
    _, path = scripted(Plain, "cut.pt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(AccelkitError, match=r"cut.pt cannot be loaded as TorchScript"):
        open_extractor(path)
    with pytest.raises(AccelkitError, match=r"makes pooled features of shape \(2, 3, 1, 1\)"):
        open_extractor(scripted(Unpooled)[1])
    with pytest.raises(AccelkitError, match=r"net.pt does not map uint8 images"):
        open_extractor(scripted(Pair)[1])


def test_another_hash_than_the_recorded_is_refused(scripted):
    _, path = scripted(Plain)
    recorded = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_extractor(path, recorded).sha256 == recorded
    with pytest.raises(AccelkitError, match=r"weights of net have SHA-256 .*, those recorded 0000"):
        open_extractor(path, "0" * 64)


def test_a_file_of_another_hash_is_not_loaded(tmp_path, scripted, monkeypatch):
    """A TorchScript file is a program, so it is not loaded before its hash is compared."""
    path = tmp_path / "text.pt"
    path.write_text("no network")
    with pytest.raises(AccelkitError, match=r"weights of text have SHA-256"):
        open_extractor(path, "0" * 64)

    def load(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr(torch.jit, "load", load)
    with pytest.raises(AccelkitError, match=r"those recorded 0000"):
        open_extractor(scripted(Plain)[1], "0" * 64)


def test_wrong_images_are_refused(scripted, images):
    extractor = open_extractor(scripted(Plain)[1])
    with pytest.raises(TypeError, match="expected uint8"):
        extractor(images.astype(np.float32))
    with pytest.raises(AccelkitError, match=r"expected \(n, height, width, 3\)"):
        extractor(images[..., 0])
