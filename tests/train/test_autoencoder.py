"""The first stage: it learns, records the scale of its latents, and survives saving."""

from dataclasses import replace

import pytest
import torch

from accelkit.errors import AccelkitError
from accelkit.train import autoencoder
from accelkit.train.autoencoder import AutoencoderConfig, build_autoencoder, train_autoencoder

CONFIG = AutoencoderConfig(
    channels=(8, 8), latent_channels=2, steps=25, batch_size=8, learning_rate=0.02
)


@pytest.fixture(scope="module")
def images():
    """Three hundred flat pictures of 8 by 8 pixels, more than are encoded at a time."""
    colours = torch.randint(256, (300, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    return colours.expand(300, 3, 8, 8).to(torch.uint8)


@pytest.fixture(scope="module")
def trained(images):
    losses = []
    vae = train_autoencoder(images, CONFIG, lambda step, loss: losses.append((step, loss)))
    return vae, losses


def weights(vae):
    return torch.cat([value.flatten() for value in vae.state_dict().values()])


def test_architecture():
    vae = build_autoencoder(AutoencoderConfig(), 32)
    latents = vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert latents.shape == (1, 4, 8, 8)
    assert vae.decode(latents).sample.shape == (1, 3, 32, 32)
    assert vae.config.sample_size == 32


def test_loss_falls(trained):
    _, losses = trained
    assert [step for step, _ in losses] == list(range(1, 26))
    first, last = losses[:3], losses[-3:]
    assert sum(loss for _, loss in last) < 0.8 * sum(loss for _, loss in first)


def test_first_loss(images):
    """Squared plus absolute error plus the weighted KL per latent, of the first step's batch."""
    config = replace(CONFIG, steps=1, batch_size=300, kl_weight=0.5)
    losses = []
    train_autoencoder(images, config, lambda step, loss: losses.append(loss))
    vae = build_autoencoder(config, 8)
    x = images[torch.randint(300, (300,), generator=torch.Generator().manual_seed(0))]
    x = (x.double() / 127.5 - 1).float()
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
        mean, variance = posterior.mean.double(), posterior.var.double()
        kl = 0.5 * (mean**2 + variance - 1 - variance.log()).mean()
        error = vae.decode(posterior.sample(torch.Generator().manual_seed(7))).sample - x
    expected = error.square().mean() + error.abs().mean() + 0.5 * kl
    assert losses == [pytest.approx(expected.item(), rel=0.01)]


def test_scale_is_the_inverse_deviation_of_sampled_latents(trained, images):
    vae, _ = trained
    with torch.no_grad():
        posterior = vae.encode(images.float() / 127.5 - 1).latent_dist
        rng = torch.Generator().manual_seed(0)
        drawn = torch.cat([posterior.sample(rng) for _ in range(20)])
    assert vae.config.scaling_factor == pytest.approx(1 / drawn.std().item(), rel=0.01)
    assert (drawn * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.01)


def test_weights_survive_half_precision(trained):
    vae, _ = trained
    values = weights(vae)
    assert values.dtype == torch.float32
    assert torch.equal(values, values.half().float())
    assert not vae.training


def test_saved_and_loaded(trained, tmp_path):
    vae, _ = trained
    vae.save_pretrained(tmp_path)
    loaded = type(vae).from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == vae.config.scaling_factor
    assert torch.equal(weights(loaded), weights(vae))


def test_seed_decides_everything(images):
    config = replace(CONFIG, steps=4)
    one = train_autoencoder(images, config)
    torch.manual_seed(99)
    torch.randn(5)
    other = train_autoencoder(images, config)
    assert torch.equal(weights(one), weights(other))
    assert one.config.scaling_factor == other.config.scaling_factor
    third = train_autoencoder(images, replace(config, seed=1))
    assert not torch.equal(weights(one), weights(third))


def test_not_finite(images):
    with pytest.raises(AccelkitError, match=r"loss is (nan|inf) at step .*; lower") as caught:
        train_autoencoder(images, replace(CONFIG, learning_rate=1e30))
    assert "\n" not in str(caught.value)


def test_a_gradient_that_is_not_finite_in_the_last_step(images, monkeypatch):
    """No loss of a later step would show what it did to the weights."""
    build = autoencoder.build_autoencoder

    def spoilt(config, size):
        vae = build(config, size)
        vae.decoder.conv_out.weight.register_hook(lambda gradient: gradient * torch.nan)
        return vae

    monkeypatch.setattr(autoencoder, "build_autoencoder", spoilt)
    with pytest.raises(AccelkitError, match="gradient norm is nan at step 1; lower"):
        train_autoencoder(images, replace(CONFIG, steps=1))


def test_weights_that_half_precision_cannot_hold(images, monkeypatch):
    build = autoencoder.build_autoencoder

    def huge(config, size):
        vae = build(config, size)
        vae.quant_conv.weight.data.fill_(1e-9)  # the loss stays finite
        vae.quant_conv.bias.data[:4].fill_(1e5)
        vae.post_quant_conv.weight.data.fill_(1e-9)
        return vae

    monkeypatch.setattr(autoencoder, "build_autoencoder", huge)
    with pytest.raises(AccelkitError, match=r"latents have a deviation of (inf|nan); lower"):
        train_autoencoder(images, replace(CONFIG, steps=1))
