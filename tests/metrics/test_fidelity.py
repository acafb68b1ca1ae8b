import hashlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from accelkit.errors import AccelkitError
from accelkit.metrics.extractors import open_extractor


class Branch(nn.Module):
    """A 1x1 convolution, its normalisation and activation, as in torch-fidelity."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 1, bias=False)
        self.bn = nn.BatchNorm2d(9)

    def forward(self, x):
        return nn.functional.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch1x1 = Branch()

    def forward(self, x):
        return torch.cat([self.branch1x1(x), x], dim=1)


class Network(nn.Module):
    """The arguments, outputs and layers of torch-fidelity's extractor, at 17x17."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        self.features_list = features_list
        self.Mixed_6d = Block()
        self.fc = nn.Linear(12, 4)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        self.eval()

    def forward(self, x):
        assert x.dtype == torch.uint8
        x = nn.functional.interpolate(x.float(), size=[17, 17]) / 128 - 1
        pooled = self.Mixed_6d(x).mean(dim=(2, 3))
        found = {"2048": pooled, "logits_unbiased": pooled @ self.fc.weight.T}
        return tuple(found[name] for name in self.features_list)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that looks like torch-fidelity, and its weights in torch.hub's folder."""
    draw = torch.Generator().manual_seed(0)
    state = {
        "Mixed_6d.branch1x1.conv.weight": torch.randn(9, 3, 1, 1, generator=draw),
        "Mixed_6d.branch1x1.bn.num_batches_tracked": torch.tensor(0),
        "fc.weight": torch.randn(4, 12, generator=draw),
        "fc.bias": torch.randn(4, generator=draw),
    }
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"Mixed_6d.branch1x1.bn.{name}"] = torch.rand(9, generator=draw)
    torch.save(state, tmp_path / "weights")
    data = (tmp_path / "weights").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"weights-inception-{sha256[:8]}.pth"
    weights = tmp_path / "hub" / "checkpoints" / name
    weights.parent.mkdir(parents=True)
    weights.write_bytes(data)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    package, part = ModuleType("torch_fidelity"), ModuleType("inception")
    package.__version__ = "0.4.0"
    part.FeatureExtractorInceptionV3 = Network
    part.URL_INCEPTION_V3 = f"https://weights.invalid/{name}"
    package.feature_extractor_inceptionv3 = part
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    return weights, sha256


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (70, 17, 17, 3), dtype=np.uint8)


def test_spatial_features_are_seven_channels_after_the_activation(installed, images):
    weights, sha256 = installed
    extractor = open_extractor("torch-fidelity")
    assert (extractor.sha256, extractor.version, extractor.size) == (sha256, "0.4.0", None)
    found = extractor.extract(images)
    state = torch.load(weights, weights_only=True)
    bn = {k.rsplit(".", 1)[1]: v.double().numpy() for k, v in state.items() if ".bn." in k}
    x = images.astype(np.float64) / 128 - 1
    conv = x @ state["Mixed_6d.branch1x1.conv.weight"][:, :, 0, 0].double().numpy().T
    scale = bn["weight"] / np.sqrt(bn["running_var"] + 1e-5)
    expected = np.maximum((conv - bn["running_mean"]) * scale + bn["bias"], 0)
    np.testing.assert_allclose(
        found["spatial"], expected[..., :7].reshape(70, -1), rtol=1e-3, atol=1e-4
    )
    assert found["spatial"].shape == (70, extractor.spatial_dim)
    pooled = np.concatenate([expected, x], axis=3).mean(axis=(1, 2))
    np.testing.assert_allclose(found["pooled"], pooled, rtol=1e-3, atol=1e-4)
    logits = pooled @ state["fc.weight"].double().numpy().T
    odds = np.exp(logits)
    np.testing.assert_allclose(
        found["probabilities"], odds / odds.sum(axis=1, keepdims=True), rtol=1e-3, atol=1e-5
    )


def test_the_real_network_has_the_layers_that_are_asked_for():
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    assert inception.URL_INCEPTION_V3.endswith("weights-inception-2015-12-05-6726825d.pth")
    features = inception.FeatureExtractorInceptionV3.get_provided_features_list()
    assert {"2048", "logits_unbiased"} <= set(features)
    block = inception.InceptionC(768, channels_7x7=160)
    seen = []
    block.branch1x1.register_forward_hook(lambda module, given, output: seen.append(output))
    out = block.eval()(torch.randn(1, 768, 17, 17, generator=torch.Generator().manual_seed(0)))
    assert seen[0].shape == (1, 192, 17, 17)
    assert seen[0].min() == 0
    torch.testing.assert_close(out[:, :192], seen[0])


def test_a_missing_package_is_named_with_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(AccelkitError, match=r"cannot be imported .*pip install 'accelkit\[fid\]'"):
        open_extractor("torch-fidelity")


def test_weights_that_are_damaged_or_hold_more_than_weights_are_refused(installed):
    weights, _ = installed
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AccelkitError, match=r"are damaged \(the SHA-256 does not start with"):
        open_extractor("torch-fidelity")


def test_weights_of_another_hash_are_not_loaded(installed, monkeypatch):
    _, sha256 = installed
    assert open_extractor("torch-fidelity", sha256.upper()).sha256 == sha256

    def load(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(AccelkitError, match=r"weights of torch-fidelity .* recorded 0{12}…"):
        open_extractor("torch-fidelity", "0" * 64)


def test_weights_are_read_as_weights_only(installed, monkeypatch, tmp_path):
    weights, _ = installed
    torch.save({"weight": tmp_path}, weights)  # a path is no tensor
    start = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    other = weights.with_name(f"weights-inception-{start}.pth")
    weights.rename(other)
    part = sys.modules["torch_fidelity"].feature_extractor_inceptionv3
    monkeypatch.setattr(part, "URL_INCEPTION_V3", f"https://weights.invalid/{other.name}")
    with pytest.raises(AccelkitError, match="are damaged"):
        open_extractor("torch-fidelity")


def test_without_a_network_the_place_for_the_weights_is_named(installed, monkeypatch):
    weights, _ = installed
    weights.unlink()

    def fail(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(AccelkitError, match=r"no route to host\); put https://.* at .*\.pth"):
        open_extractor("torch-fidelity")
