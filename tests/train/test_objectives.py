"""The losses against float64: Bayes' rule, torch.distributions and numeric integration."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy import integrate, stats
from torch.distributions import Normal, kl_divergence

from accelkit.errors import AccelkitError
from accelkit.noise.processes import DiscreteProcess
from accelkit.noise.schedulers import forward_process
from accelkit.train.objectives import denoising_loss, gaussian_kl, variational_term

T = 1000
BETA = np.linspace(1e-4, 0.02, T)
ABAR = np.cumprod(1 - BETA)
BEFORE = np.append(1.0, ABAR[:-1])
SHAPE = (4, 2, 2)


@pytest.fixture
def process():
    return DiscreteProcess(torch.from_numpy(BETA))


def bayes(t, x0, xt):
    """Mean and variance of q(x_{t-1} | x_t, x_0) for t > 0, as a product of two Gaussians."""
    prior, step = 1 - BEFORE[t], BETA[t]
    precision = 1 / prior + (1 - step) / step
    mean = (np.sqrt(BEFORE[t]) * x0 / prior + np.sqrt(1 - step) * xt / step) / precision
    return mean, 1 / precision


def log_variance(t, v):
    low = np.log(bayes(max(t, 1), 0.0, 0.0)[1])
    return low + (v + 1) / 2 * (np.log(BETA[t]) - low)


def guess(t, eps, xt):
    return (xt - np.sqrt(1 - ABAR[t]) * eps) / np.sqrt(ABAR[t])


def bin_probability(x, mean, deviation):
    """Mass of N(mean, deviation^2) in the bin of 2/255 around x, the end bins without end."""
    low = mean - 40 * deviation if x < -0.999 else x - 1 / 255
    high = mean + 40 * deviation if x > 0.999 else x + 1 / 255
    density = stats.norm(mean, deviation).pdf
    peak = [mean] if low < mean < high else None
    return integrate.quad(density, low, high, points=peak, epsabs=0, epsrel=1e-10, limit=200)[0]


def expected_term(t, eps, v, x0, xt):
    """One sample's variational term in bits per element, float64, elements one by one."""
    total = 0.0
    for e, w, x, y in zip(eps.flat, v.flat, x0.flat, xt.flat, strict=True):
        deviation = math.exp(log_variance(t, w) / 2)
        if t == 0:
            total -= math.log(bin_probability(x, guess(0, e, y), deviation))
        else:
            mean, variance = (torch.tensor(value) for value in bayes(t, x, y))
            model = torch.tensor(bayes(t, guess(t, e, y), y)[0])
            total += kl_divergence(
                Normal(mean, variance.sqrt()), Normal(model, torch.tensor(deviation))
            ).item()
    return total / eps.size / math.log(2)


def batch(timesteps, seed=0, error=0.3):
    """float64 x0, eps, xt, a network's eps and v; at t = 0 x0 lies on byte values, ends included"""
    rng = np.random.default_rng(seed)
    shape = (len(timesteps), *SHAPE)
    x0, eps, v = rng.normal(size=shape), rng.normal(size=shape), rng.uniform(-1.2, 1.2, shape)
    bytes_ = rng.integers(0, 256, shape)
    bytes_[:, 0, 0, 0], bytes_[:, 0, 0, 1] = 0, 255
    t = np.array(timesteps)
    x0[t == 0] = bytes_[t == 0] / 127.5 - 1
    abar = ABAR[t][:, None, None, None]
    xt = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps
    return x0, eps, xt, eps + error * rng.normal(size=shape), v


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float32) for a in arrays]


def everywhere(process, name):
    return process.at(name, torch.arange(T), torch.empty(T)).double().numpy()


@pytest.mark.parametrize(
    ("t", "value", "digits"),
    [(0, 0.9999, 4), (100, 0.8951, 4), (250, 0.5214, 4), (500, 0.0778, 4), (750, 0.0033, 4)],
)
def test_alpha_bar(process, t, value, digits):
    assert round(float(everywhere(process, "signal")[t] ** 2), digits) == value


def test_last_alpha_bar(process):
    assert everywhere(process, "signal")[999] ** 2 == pytest.approx(4.0e-5, rel=0.02)


def test_signal_and_noise_tables(process):
    np.testing.assert_allclose(everywhere(process, "signal"), np.sqrt(ABAR), rtol=1e-6)
    np.testing.assert_allclose(everywhere(process, "noise"), np.sqrt(1 - ABAR), rtol=1e-6)
    np.testing.assert_allclose(everywhere(process, "log_beta"), np.log(BETA), rtol=1e-6)


def test_posterior_is_what_bayes_says(process):
    t = np.arange(1, T)
    of_x0, variance = bayes(t, 1.0, 0.0)
    np.testing.assert_allclose(everywhere(process, "mean_x0")[1:], of_x0, rtol=1e-6)
    np.testing.assert_allclose(everywhere(process, "mean_xt")[1:], bayes(t, 0.0, 1.0)[0], rtol=1e-6)
    np.testing.assert_allclose(np.exp(everywhere(process, "log_posterior")[1:]), variance, 2e-6)


def test_first_posterior_is_a_point_with_the_second_ones_log_variance(process):
    assert everywhere(process, "mean_x0")[0] == pytest.approx(1)
    assert everywhere(process, "mean_xt")[0] == 0
    log_posterior = everywhere(process, "log_posterior")
    assert log_posterior[0] == log_posterior[1]


def test_steps_and_dtype(process):
    assert process.steps == T
    assert process.at("signal", torch.tensor([3]), torch.empty(1, 4, 2, 2)).dtype == torch.float32


def test_add_noise(process):
    x0, eps, xt, _, _ = batch([0, 17, 500, 999])
    t = torch.tensor([0, 17, 500, 999])
    np.testing.assert_allclose(process.add_noise(*tensors(x0, eps), t), xt, rtol=1e-5, atol=1e-6)


def test_a_schedulers_process(process):
    theirs = forward_process(DDIMScheduler())
    np.testing.assert_allclose(everywhere(theirs, "signal"), np.sqrt(ABAR), rtol=1e-5)
    x0, eps, _, _, _ = batch([0, 400, 999])
    t = torch.tensor([0, 400, 999])
    added = DDIMScheduler().add_noise(*tensors(x0, eps), t)
    torch.testing.assert_close(theirs.add_noise(*tensors(x0, eps), t), added, rtol=1e-5, atol=1e-6)


def test_kl_of_gaussians():
    rng = torch.Generator().manual_seed(0)
    m1, l1, m2, l2 = torch.randn(4, 200, generator=rng, dtype=torch.float64)
    expected = kl_divergence(Normal(m1, (l1 / 2).exp()), Normal(m2, (l2 / 2).exp()))
    torch.testing.assert_close(gaussian_kl(m1, l1, m2, l2), expected)


def test_kl_of_equal_gaussians_is_zero():
    x = torch.linspace(-5, 5, 11)
    assert torch.equal(gaussian_kl(x, x, x, x), torch.zeros(11))


@pytest.mark.parametrize("t", [0, 1, 2, 60, 500, 999])
def test_term_in_bits(process, t):
    x0, _, xt, predicted, v = batch([t, t], seed=t)
    term = variational_term(process, *tensors(predicted, v, x0, xt), torch.tensor([t, t]))
    expected = [expected_term(t, *row) for row in zip(predicted, v, x0, xt, strict=True)]
    np.testing.assert_allclose(term, expected, rtol=2e-3 if t == 0 else 5e-4)


def test_terms_of_mixed_timesteps(process):
    timesteps = [700, 0, 3, 0]
    x0, _, xt, predicted, v = batch(timesteps)
    term = variational_term(process, *tensors(predicted, v, x0, xt), torch.tensor(timesteps))
    rows = zip(timesteps, predicted, v, x0, xt, strict=True)
    np.testing.assert_allclose(term, [expected_term(*row) for row in rows], rtol=2e-3)


@pytest.mark.parametrize("byte", [0, 1, 100, 254, 255])
@pytest.mark.parametrize("shift", [-2.5, -0.4, 0.0, 0.4, 2.5])
def test_likelihood_of_a_byte(process, byte, shift):
    """At t = 0, by numeric integration, for means ``shift`` deviations off the byte's value."""
    x = byte / 127.5 - 1
    deviation = math.exp(log_variance(0, 1.0) / 2)
    mean = x + shift * deviation
    eps = -mean * math.sqrt(ABAR[0]) / math.sqrt(1 - ABAR[0])  # so that x_t = 0 means just that
    eps, v, x0, xt = (torch.full((1, 1, 1, 1), value) for value in (eps, 1.0, x, 0.0))
    bits = variational_term(process, eps, v, x0, xt, torch.tensor([0])).item()
    assert bits == pytest.approx(-math.log2(bin_probability(x, mean, deviation)), rel=1e-3)


def test_bytes_share_all_probability(process):
    """The 256 bins leave no gap and do not overlap."""
    x = torch.arange(256).view(-1, 1, 1, 1) / 127.5 - 1
    mean = torch.full_like(x, 0.9)  # 0.1 or about ten deviations below the end
    eps = -mean * math.sqrt(ABAR[0]) / math.sqrt(1 - ABAR[0])
    zero = torch.zeros_like(x)
    bits = variational_term(process, eps, zero + 1, x, zero, torch.zeros(256, dtype=torch.long))
    assert (2 ** -bits.double()).sum().item() == pytest.approx(1, abs=1e-5)


def test_hopeless_byte_is_floored(process):
    one = torch.ones(1, 1, 1, 1)
    for x, error in ((-1.0, -500.0), (0.0, -500.0), (0.0, 500.0), (1.0, 500.0)):
        xt = x * math.sqrt(ABAR[0]) * one
        bits = variational_term(process, error * one, one, x * one, xt, torch.tensor([0]))
        assert bits.item() == pytest.approx(-math.log2(1e-12), rel=1e-6)


@pytest.mark.parametrize("t", [1, 30, 500, 999])
def test_perfect_prediction_costs_nothing(process, t):
    x0, eps, xt, _, v = tensors(*batch([t]))
    term = variational_term(process, eps, -torch.ones_like(v), x0, xt, torch.tensor([t]))
    assert 0 <= term.item() < 1e-6


@pytest.mark.parametrize("t", [1, 30])
def test_wrong_variance_costs_bits(process, t):
    x0, eps, xt, _, v = tensors(*batch([t]))
    term = variational_term(process, eps, torch.ones_like(v), x0, xt, torch.tensor([t]))
    ratio = bayes(t, 0.0, 0.0)[1] / BETA[t]
    assert term.item() == pytest.approx((ratio - 1 - math.log(ratio)) / 2 / math.log(2), rel=0.01)


@pytest.mark.parametrize("t", [1, 5, 20])
def test_best_variance_is_the_true_one_plus_the_squared_error_of_the_mean(process, t):
    x0, eps, xt, _, _ = batch([t])
    variance = bayes(t, 0.0, 0.0)[1]
    share = 0.4  # of the way from the posterior's log-variance to the forward step's
    best = variance * (BETA[t] / variance) ** share
    off = math.sqrt(best - variance)  # by how much the mean must be wrong for that
    slope = bayes(t, 1.0, 0.0)[0] * np.sqrt(1 - ABAR[t]) / np.sqrt(ABAR[t])
    wrong, x0, xt = tensors(eps + off / slope, x0, xt)
    v = torch.full_like(x0, 2 * share - 1, requires_grad=True)

    def term(v):
        return variational_term(process, wrong, v, x0, xt, torch.tensor([t])).sum()

    at_best = torch.autograd.grad(term(v), v)[0].abs().max()
    beside = torch.autograd.grad(term(v + 0.1), v)[0].abs().min()
    assert at_best < 0.02 * beside
    assert term(v) < term(v - 0.1)
    assert term(v) < term(v + 0.1)


def test_plain_loss_is_the_squared_error(process):
    x0, eps, xt, predicted, _ = batch([0, 10, 999])
    t = torch.tensor([0, 10, 999])
    loss = denoising_loss(process, *tensors(predicted, x0, eps, xt), t)
    np.testing.assert_allclose(loss, ((predicted - eps) ** 2).mean((1, 2, 3)), rtol=1e-5)


def test_hybrid_loss(process):
    timesteps = [0, 10, 999]
    x0, eps, xt, predicted, v = batch(timesteps)
    output = np.concatenate([predicted, v], axis=1)
    loss = denoising_loss(process, *tensors(output, x0, eps, xt), torch.tensor(timesteps))
    terms = [expected_term(*r) for r in zip(timesteps, predicted, v, x0, xt, strict=True)]
    np.testing.assert_allclose(loss, ((predicted - eps) ** 2).mean((1, 2, 3)) + terms, rtol=2e-3)


def test_what_each_half_of_the_output_learns_from(process):
    """The noise channels from the squared error alone, the variance channels from the bound."""
    timesteps = torch.tensor([0, 10, 999])
    x0, eps, xt, predicted, v = tensors(*batch(timesteps.tolist()))
    output = torch.cat([predicted, v], dim=1).requires_grad_()
    denoising_loss(process, output, x0, eps, xt, timesteps).sum().backward()
    numbers = math.prod(SHAPE)
    torch.testing.assert_close(output.grad[:, :4], 2 * (predicted - eps) / numbers)
    v.requires_grad_()
    variational_term(process, predicted, v, x0, xt, timesteps).sum().backward()
    torch.testing.assert_close(output.grad[:, 4:], v.grad)
    assert (v.grad.flatten(1).abs().amax(1) > 0).all()


def test_gradients_stay_finite_far_out(process):
    """Timesteps of both kinds, a mean far off and a variance far outside its range."""
    timesteps = torch.tensor([0, 0, 1, 500, 999])
    x0, eps, xt, _, _ = tensors(*batch(timesteps.tolist()))
    for v in (-8.0, 0.0, 8.0):
        for error in (0.0, 50.0):
            output = torch.cat([eps + error, torch.full_like(eps, v)], dim=1).requires_grad_()
            loss = denoising_loss(process, output, x0, eps, xt, timesteps)
            loss.sum().backward()
            assert loss.isfinite().all()
            assert output.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_a_half_precision_output_is_float32(process, dtype):
    x0, eps, xt, predicted, v = tensors(*batch([0, 300]))
    output, t = torch.cat([predicted, v], dim=1).to(dtype), torch.tensor([0, 300])
    loss = denoising_loss(process, output, x0, eps, xt, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, denoising_loss(process, output.float(), x0, eps, xt, t))


@pytest.mark.parametrize("channels", [1, 3, 6, 12])
def test_other_numbers_of_channels(process, channels):
    x0, eps, xt, _, _ = tensors(*batch([5]))
    with pytest.raises(AccelkitError, match=f"returned {channels} channels.*expected 4, or 8"):
        denoising_loss(process, torch.zeros(1, channels, 2, 2), x0, eps, xt, torch.tensor([5]))
