"""What a denoiser is trained on: the forward process and the losses of DDPM and improved DDPM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.errors import AccelkitError


class DiscreteProcess:
    """The variance-preserving forward process of T steps, with what its losses need.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for t = 0 .. T-1, where t = 0 has one step of
    noise already (Ho et al. 2020, eq. 4). Tables are computed in float64 and kept in float32.

    Args:
        betas: shape (T,), the noise added at each step.
        device: where the tables live.
    """

    def __init__(self, betas: Tensor, device: torch.device | str = "cpu") -> None:
        beta = betas.double().cpu().numpy()
        alpha_bar = np.cumprod(1 - beta)
        before = np.append(1.0, alpha_bar[:-1])
        posterior = beta * (1 - before) / (1 - alpha_bar)
        # at t = 0 the posterior is a point; its log is replaced by that of t = 1
        log_posterior = np.log(np.append(posterior[1], posterior[1:]))
        tables = {
            "signal": np.sqrt(alpha_bar),
            "noise": np.sqrt(1 - alpha_bar),
            "log_beta": np.log(beta),
            "log_posterior": log_posterior,
            "mean_x0": beta * np.sqrt(before) / (1 - alpha_bar),
            "mean_xt": (1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar),
        }
        self.steps = len(beta)
        self._tables = {
            name: torch.tensor(table, dtype=torch.float32, device=device)
            for name, table in tables.items()
        }

    @classmethod
    def of(cls, scheduler: Any, device: torch.device | str = "cpu") -> DiscreteProcess:
        """Return the process a diffusers scheduler was configured for.

        Raises:
            AccelkitError: it has no betas, or the model predicts something other than noise.
        """
        betas = getattr(scheduler, "betas", None)
        predicts = scheduler.config.get("prediction_type", "epsilon")
        if betas is None or predicts != "epsilon":
            raise AccelkitError(
                "training needs a process with betas and a model that predicts the noise; "
                f"{type(scheduler).__name__} has prediction_type {predicts!r}"
            )
        return cls(betas, device)

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return the named table at ``t`` (B,), shaped to broadcast over ``like`` (B, ...)."""
        return self._tables[name][t].view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t, shaped as ``x0`` (B, C, H, W); ``t`` holds B whole timesteps."""
        return self.at("signal", t, x0) * x0 + self.at("noise", t, x0) * eps


def denoising_loss(
    process: DiscreteProcess, output: Tensor, x0: Tensor, eps: Tensor, xt: Tensor, t: Tensor
) -> Tensor:
    """Return the loss of each sample, shape (B,), float32.

    The mean squared error of the predicted noise; if ``output`` has twice the channels of ``x0``
    the second half parametrises the variance and the variational term is added. Its mean is taken
    from the detached prediction, so it trains the variance alone (Nichol and Dhariwal 2021, eq. 16:
    one of T terms drawn at random has the expectation L_vlb / T).

    Args:
        process: the forward process.
        output: (B, C or 2C, H, W), what the network returned.
        x0, eps, xt: (B, C, H, W): data, noise and their mixture at ``t``.
        t: (B,) whole timesteps.

    Raises:
        AccelkitError: ``output`` has another number of channels.
    """
    channels = x0.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise AccelkitError(
            f"the network returned {output.shape[1]} channels for {channels} of data; expected "
            f"{channels}, or {2 * channels} with a learned variance"
        )
    output = output.float()
    predicted = output[:, :channels]
    loss = (eps - predicted).square().flatten(1).mean(1)
    if output.shape[1] == channels:
        return loss
    return loss + variational_term(process, predicted.detach(), output[:, channels:], x0, xt, t)


def variational_term(
    process: DiscreteProcess, eps: Tensor, v: Tensor, x0: Tensor, xt: Tensor, t: Tensor
) -> Tensor:
    """Return one term of the variational bound in bits per element, shape (B,).

    For t > 0 the KL divergence of the model's step from the true posterior; at t = 0 the negative
    log-likelihood of x_0 in bins of 1/127.5 under the model's Gaussian. The log-variance lies
    between those of the posterior (v = -1) and of the forward step (v = 1), interpolated
    (Nichol and Dhariwal 2021, eq. 15).
    """
    low, high = process.at("log_posterior", t, xt), process.at("log_beta", t, xt)
    log_variance = (v + 1) / 2 * high + (1 - v) / 2 * low
    guess = (xt - process.at("noise", t, xt) * eps) / process.at("signal", t, xt)
    true_mean = _posterior_mean(process, x0, xt, t)
    mean = _posterior_mean(process, guess, xt, t)
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

    The end bins reach to infinity. Differences of two nearly equal cdf values are floored, as far
    out in a tail neither float32 nor the gradient holds anything.
    """
    deviation = torch.exp(0.5 * log_variance)
    upper = torch.special.ndtr((x - mean + 1 / 255) / deviation)
    lower = torch.special.ndtr((x - mean - 1 / 255) / deviation)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp_min(1e-12).log()
