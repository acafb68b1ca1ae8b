"""Losses of a denoiser: the squared error of its prediction, and the variational bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accelkit.errors import AccelkitError
from accelkit.noise.processes import DiscreteProcess, ForwardProcess


def denoising_loss(
    process: ForwardProcess, output: Tensor, x0: Tensor, eps: Tensor, xt: Tensor, t: Tensor
) -> Tensor:
    """Return the loss of each sample, shape (B,), float32.

    The mean squared error of the prediction. If ``output`` has twice the channels of ``x0``, the
    second half parametrises the variance and the variational term is added. The term takes its mean
    from the detached prediction, so it trains the variance alone (Nichol and Dhariwal 2021, eq. 16:
    one of T terms drawn at random is L_vlb / T on average).

    Args:
        process: the forward process.
        output: output of the network, (B, C or 2C, ...).
        x0, eps, xt: data, noise and their mixture at ``t``, (B, C, ...).
        t: timesteps of the process, (B,).

    Raises:
        AccelkitError: ``output`` has another number of channels, or a variance although the process
            has no discrete steps.
    """
    channels = x0.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise AccelkitError(
            f"the network returned {output.shape[1]} channels for {channels} of data; expected "
            f"{channels}, or {2 * channels} with a learned variance"
        )
    output = output.float()
    predicted = output[:, :channels]
    loss = (process.target(x0, eps, t) - predicted).square().flatten(1).mean(1)
    if output.shape[1] == channels:
        return loss
    if not isinstance(process, DiscreteProcess):
        raise AccelkitError(
            "the network also predicts a variance, which needs a process of discrete steps with "
            "betas; give the pipeline the scheduler it was trained with"
        )
    return loss + variational_term(process, predicted.detach(), output[:, channels:], x0, xt, t)


def variational_term(
    process: DiscreteProcess, predicted: Tensor, v: Tensor, x0: Tensor, xt: Tensor, t: Tensor
) -> Tensor:
    """Return one term of the variational bound in bits per element, shape (B,).

    For t > 0 the KL divergence of the model's step from the true posterior; at t = 0 the negative
    log-likelihood of x_0 in bins of 1/127.5 under the model's Gaussian. The log-variance is
    between those of the posterior (v = -1) and of the forward step (v = 1), interpolated
    (Nichol and Dhariwal 2021, eq. 15).
    """
    low, high = process.at("log_posterior", t, xt), process.at("log_beta", t, xt)
    log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low
    true_mean = _posterior_mean(process, x0, xt, t)
    mean = _posterior_mean(process, process.data_of(predicted, xt, t), xt, t)
    kl = gaussian_kl(true_mean, low, mean, log_variance).flatten(1).mean(1)
    nll = -_binned_log_likelihood(x0, mean, log_variance).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)


def _posterior_mean(process: DiscreteProcess, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    return process.at("mean_x0", t, xt) * x0 + process.at("mean_xt", t, xt) * xt


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Return KL(N(mean1, var1) || N(mean2, var2)) element by element, in nats."""
    ratio = log_var1 - log_var2
    distance = (mean1 - mean2).square() * torch.exp(-log_var2)
    return 0.5 * (torch.exp(ratio) - 1 - ratio + distance)


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return log P of the bin of half-width 1/255 around ``x`` (Ho et al. 2020, eq. 13).

    The end bins reach to infinity. Differences of two nearly equal cdf values are floored, since
    float32 has no digits of them, nor of their gradient, far out in a tail.
    """
    deviation = torch.exp(0.5 * log_variance)
    upper = torch.special.ndtr((x - mean + 1 / 255) / deviation)
    lower = torch.special.ndtr((x - mean - 1 / 255) / deviation)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp_min(1e-12).log()
