"""The coefficients of `guided_step` for DDIM, DDPM and DPM-Solver++.

All are of variance-preserving processes, x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, and take abar at
the present step and at the next one, as plain numbers; abar = 1 is the data. They are worked out in
double precision on the host: one row for each step of a schedule, before sampling begins.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["StepCoefficients", "ddim_coefficients", "ddpm_coefficients", "dpmpp_coefficients"]

Prediction = Literal["epsilon", "sample", "v_prediction"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]


class StepCoefficients(NamedTuple):
    """One step of a sampler.

    Attributes:
        guidance: w in eps = u + w (c - u); 1 is none.
        x0_from_x: p in x0 = p x + q eps.
        x0_from_eps: q.
        x0_limit: x0 is kept between minus this and this; infinity for no limit.
        from_x: a in next = a x + b x0 + e eps + f previous x0 + s exp(r variance) noise.
        from_x0: b.
        from_eps: e.
        from_previous: f.
        noise: s.
        spread: r.
    """

    guidance: float = 1.0
    x0_from_x: float = 0.0
    x0_from_eps: float = 0.0
    x0_limit: float = math.inf
    from_x: float = 0.0
    from_x0: float = 0.0
    from_eps: float = 0.0
    from_previous: float = 0.0
    noise: float = 0.0
    spread: float = 0.0

    def tensor(self, device: torch.device | str | None = None) -> Tensor:
        """Return them as float32 (10,); stacked, those of all steps make a table of a run."""
        return torch.tensor(self, dtype=torch.float32, device=device)


def ddim_coefficients(
    abar: float,
    abar_next: float,
    eta: float = 0.0,
    guidance: float = 1.0,
    prediction: Prediction = "epsilon",
    x0_limit: float = math.inf,
) -> StepCoefficients:
    """DDIM (Song et al. 2021, eq. 12 and 16); `eta` above 0 adds noise, 1 as much as DDPM.

    Raises:
        ValueError: abar is not in (0, 1), abar_next not in (0, 1], or a prediction unknown.
    """
    step = _predicted(abar, abar_next, guidance, prediction, x0_limit)
    std = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
    direction = math.sqrt(max(0.0, 1 - abar_next - std**2))
    alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    # the noise in x and the model's output, which the limit leaves alone
    of_x, of_eps = {
        "epsilon": (0.0, 1.0),
        "sample": (1 / sigma, -alpha / sigma),
        "v_prediction": (sigma, alpha),
    }[prediction]
    return step._replace(
        from_x=direction * of_x,
        from_x0=math.sqrt(abar_next),
        from_eps=direction * of_eps,
        noise=std,
    )


def ddpm_coefficients(
    abar: float,
    abar_next: float,
    variance: Variance = "fixed_small",
    guidance: float = 1.0,
    prediction: Prediction = "epsilon",
    x0_limit: float = math.inf,
) -> StepCoefficients:
    """Ancestral sampling (Ho et al. 2020, eq. 7), without noise in the step to the data.

    `variance` is that of the posterior ("fixed_small"), the process' own ("fixed_large"), or
    between the two as the model says (Nichol & Dhariwal 2021, eq. 15), whose `variance` output
    `guided_step` then needs.

    Raises:
        ValueError: abar is not in (0, 1), abar_next not in (0, 1], or a name unknown.
    """
    step = _predicted(abar, abar_next, guidance, prediction, x0_limit)
    alpha_step = abar / abar_next
    beta = 1 - alpha_step
    small = (1 - abar_next) / (1 - abar) * beta
    std, spread = 0.0, 0.0
    if variance not in ("fixed_small", "fixed_large", "learned_range"):
        names = "fixed_small, fixed_large or learned_range"
        raise ValueError(f"variance is {variance!r}, expected {names}")
    if small > 0:
        std = math.sqrt(beta if variance == "fixed_large" else small)
        if variance == "learned_range":
            std, spread = (small * beta) ** 0.25, math.log(beta / small) / 4
    return step._replace(
        from_x=math.sqrt(alpha_step) * (1 - abar_next) / (1 - abar),
        from_x0=math.sqrt(abar_next) * beta / (1 - abar),
        noise=std,
        spread=spread,
    )


def dpmpp_coefficients(
    abar: float,
    abar_next: float,
    abar_previous: float | None = None,
    stochastic: bool = False,
    guidance: float = 1.0,
    prediction: Prediction = "epsilon",
    x0_limit: float = math.inf,
) -> StepCoefficients:
    """DPM-Solver++(2M), and SDE-DPM-Solver++(2M) if `stochastic` (Lu et al. 2022b, algorithm 2).

    Of second order, by the midpoint form, if `abar_previous` of the step before is given; the step
    to the data is of first order all the same, as its log-SNR is infinite.

    Raises:
        ValueError: abar is not in (0, 1), abar_next not in (0, 1], or a prediction unknown.
    """
    step = _predicted(abar, abar_next, guidance, prediction, x0_limit)
    sigma, sigma_next = math.sqrt(1 - abar), math.sqrt(1 - abar_next)
    h = math.inf if abar_next == 1 else _half_log_snr(abar_next) - _half_log_snr(abar)
    decay = math.exp(-h)
    from_x, kept, std = sigma_next / sigma, 1 - decay, 0.0
    if stochastic:
        from_x, kept = from_x * decay, 1 - decay**2
        std = sigma_next * math.sqrt(kept)
    of_x0 = math.sqrt(abar_next) * kept
    extrapolated = 0.0
    if abar_previous is not None and abar_next < 1:
        extrapolated = h / (_half_log_snr(abar) - _half_log_snr(abar_previous)) / 2
    return step._replace(
        from_x=from_x,
        from_x0=of_x0 * (1 + extrapolated),
        from_previous=-of_x0 * extrapolated,
        noise=std,
    )


def _half_log_snr(abar: float) -> float:
    return (math.log(abar) - math.log1p(-abar)) / 2


def _predicted(
    abar: float, abar_next: float, guidance: float, prediction: str, x0_limit: float
) -> StepCoefficients:
    """The part that reads x0 off a prediction."""
    if not (0 < abar < 1 and 0 < abar_next <= 1):
        given = f"abar is {abar} and abar_next is {abar_next}"
        raise ValueError(f"{given}, expected them in (0, 1) and (0, 1]")
    alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
    ways = {
        "epsilon": (1 / alpha, -sigma / alpha),
        "sample": (0.0, 1.0),
        "v_prediction": (alpha, -sigma),
    }
    if prediction not in ways:
        raise ValueError(f"prediction is {prediction!r}, expected one of {', '.join(ways)}")
    of_x, of_eps = ways[prediction]
    return StepCoefficients(guidance, of_x, of_eps, x0_limit)
