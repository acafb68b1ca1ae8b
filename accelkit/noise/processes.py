"""Forward processes, which turn data into noise: x_t = a(t) x_0 + b(t) eps.

A process is its two coefficients at each timestep of a scheduler. Its log-SNR, log(a^2 / b^2),
places a timestep on the noise axis. Every prediction type is another combination of the same two,
p x_0 + q eps, which is what training regresses on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda a, b: (torch.zeros_like(a), torch.ones_like(b)),
    "v_prediction": lambda a, b: (-b, a),
    "sample": lambda a, b: (torch.ones_like(a), torch.zeros_like(b)),
    "flow_prediction": lambda a, b: (-torch.ones_like(a), torch.ones_like(b)),
}
"""Prediction types, as factors p of the data and q of the noise, from a and b.

The noise (Ho et al. 2020, eq. 14), v (Salimans and Ho 2022, appendix D), the data, and the
velocity of the straight path (Lipman et al. 2023; Esser et al. 2024, eq. 3).
"""

_LARGEST = 60.0  # stands for an infinite log-SNR, so that values next to it can be interpolated
_TINY = 1e-12


class Process(ABC):
    """A forward process of data of unit variance, at the timesteps of a scheduler.

    Attributes:
        kind: name of the process, for messages.
    """

    kind: str

    @abstractmethod
    def log_snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return log(a^2 / b^2) at raw timesteps, float64 of the same shape.

        Written without the quotient, which would lose its digits at either end of the process.
        """


class ForwardProcess(Process):
    """A process that networks can be trained on.

    Attributes:
        steps: T, number of whole timesteps.
        predicts: what the network predicts, a key of :data:`PREDICTIONS`.
        whole: whether timesteps are whole numbers, the end of :attr:`span` excluded.
    """

    steps: int
    predicts: str = "epsilon"
    whole: bool = False

    @property
    def span(self) -> tuple[float, float]:
        """First and last timestep of training."""
        return 0, self.steps

    @abstractmethod
    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` random timesteps for training, on the CPU."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b at timesteps ``t`` (B,), each (B,) float32 on t's device."""

    def to(self, device: torch.device | str) -> ForwardProcess:
        """Move tables to a device; return the process."""
        return self

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t, shaped as ``x0`` (B, C, H, W), at the timesteps ``t`` (B,)."""
        a, b = self._shaped(t, x0)
        return a * x0 + b * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the exact prediction, shaped as ``x0`` (B, C, H, W)."""
        p, q = PREDICTIONS[self.predicts](*self._shaped(t, x0))
        return p * x0 + q * eps

    def data_of(self, predicted: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Return the x_0 that a prediction at ``xt`` implies, shaped as both."""
        a, b = self._shaped(t, xt)
        p, q = PREDICTIONS[self.predicts](a, b)
        return (q * xt - b * predicted) / (a * q - b * p)

    def _shaped(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.coefficients(t)
        return _broadcast(a, like), _broadcast(b, like)


class DiscreteProcess(ForwardProcess):
    """The variance-preserving process of T steps (Ho et al. 2020, eq. 4), with its posterior.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for t = 0 .. T-1, where t = 0 has one step of
    noise already. Tables are computed in float64; those for training are kept in float32.

    Args:
        betas: noise added at each step, shape (T,).
        predicts: a key of :data:`PREDICTIONS`.
        kind: name of the process.
    """

    whole = True

    def __init__(self, betas: Tensor, predicts: str = "epsilon", kind: str = "discrete VP") -> None:
        self.predicts, self.kind = predicts, kind
        self._betas = betas.double().cpu().numpy()
        self.steps = len(self._betas)

    @cached_property
    def log_snr_table(self) -> np.ndarray:
        """The log-SNR at each whole timestep, float64 of shape (T,)."""
        with np.errstate(divide="ignore"):  # a terminal SNR of zero
            return _log_snr(np.cumsum(np.log1p(-self._betas)))

    def log_snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return the log-SNR, linear between whole timesteps."""
        finite = np.clip(self.log_snr_table, -_LARGEST, _LARGEST)
        return np.interp(timesteps, np.arange(self.steps), finite)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` whole timesteps, int64, uniform over the process."""
        return torch.randint(self.steps, (count,), generator=rng)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar) at whole timesteps."""
        return self._tables["signal"][t], self._tables["noise"][t]

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return the named table at ``t`` (B,), shaped to broadcast over ``like`` (B, ...)."""
        return _broadcast(self._tables[name][t], like)

    def to(self, device: torch.device | str) -> ForwardProcess:
        """Move the tables to a device; return the process."""
        self._tables = {name: table.to(device) for name, table in self._tables.items()}
        return self

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        beta = self._betas
        alpha_bar = np.cumprod(1 - beta)
        before = np.append(1.0, alpha_bar[:-1])
        posterior = beta * (1 - before) / (1 - alpha_bar)
        tables = {
            "signal": np.sqrt(alpha_bar),
            "noise": np.sqrt(1 - alpha_bar),
            "log_beta": np.log(beta),
            # At t = 0 the posterior is a point; its log is replaced by that of t = 1.
            "log_posterior": np.log(np.append(posterior[1], posterior[1:])),
            "mean_x0": beta * np.sqrt(before) / (1 - alpha_bar),
            "mean_xt": (1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar),
        }
        return {name: torch.tensor(table, dtype=torch.float32) for name, table in tables.items()}


@dataclass(frozen=True)
class Density:
    """Distribution of the positions on a straight path, before the scheduler's shift.

    Attributes:
        name: ``uniform``, or ``logit-normal``: the logistic function of a normal variable
            (Esser et al. 2024, eq. 19).
        mean: mean of the normal variable; 0 for SD3.
        std: standard deviation of the normal variable; 1 for SD3.
    """

    name: str = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` positions in [0, 1], float32."""
        if self.name == "uniform":
            return torch.rand(count, generator=rng)
        return torch.sigmoid(self.mean + self.std * torch.randn(count, generator=rng))


@dataclass(frozen=True)
class FlowProcess(ForwardProcess):
    """The straight path x_t = (1 - s) x_0 + s eps, with timestep = T s (Liu et al. 2022).

    In training, positions are drawn from a density and shifted as the scheduler shifts its own,
    s -> shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23). A shift changes which s are
    visited, not how much noise s means.

    Attributes:
        steps: T.
        shift: strength of the shift towards noise; 1 leaves positions as they are.
        density: distribution of the positions before the shift.
    """

    steps: int = 1000
    shift: float = 1.0
    density: Density = Density()

    kind = "flow matching"
    predicts = "flow_prediction"

    def log_snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return 2 log((1 - s) / s)."""
        return _straight(timesteps / self.steps)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` timesteps in [0, T], float32."""
        s = self.density(count, rng)
        return self.steps * (self.shift * s / (1 + (self.shift - 1) * s))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - s and s."""
        s = t.float() / self.steps
        return 1 - s, s


@dataclass(frozen=True)
class VPSDEProcess(ForwardProcess):
    """The variance-preserving SDE in continuous time (Song et al. 2021, eq. 11).

    beta(t) = low + (high - low) t for t in [0, 1]; abar(t) = exp(-integral of beta). Timesteps are
    T t - 1, so that whole ones are those of the discrete process with the same limit; T is
    ``steps``.
    """

    steps: int = 1000
    low: float = 0.1
    high: float = 20.0

    kind = "continuous VP, linear beta"

    @property
    def span(self) -> tuple[float, float]:
        """The timesteps of times 0 and 1."""
        return -1, self.steps - 1

    def beta(self, t: Any) -> Any:
        """Return beta at times ``t`` in [0, 1], a number, array or tensor."""
        return self.low + (self.high - self.low) * t

    def log_alpha_bar(self, t: Any) -> Any:
        """Return log abar at times ``t`` in [0, 1], a number, array or tensor."""
        return -(self.low * t + (self.high - self.low) * t**2 / 2)

    def log_snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return log(abar / (1 - abar))."""
        return _log_snr(self.log_alpha_bar(np.maximum((timesteps + 1) / self.steps, _TINY)))

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` timesteps, float32, of times uniform in [0, 1]."""
        return self.steps * torch.rand(count, generator=rng) - 1

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar)."""
        log_alpha_bar = self.log_alpha_bar((t.float() + 1) / self.steps)
        return (0.5 * log_alpha_bar).exp(), (-torch.expm1(log_alpha_bar)).sqrt()


@dataclass(frozen=True)
class FlowToDataProcess(Process):
    """The straight path with time running from noise, 0, to data, ``steps``."""

    steps: float

    kind = "flow matching"

    def log_snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return 2 log((1 - s) / s) for s = 1 - timestep / T."""
        return _straight(1 - timesteps / self.steps)


@dataclass(frozen=True)
class EDMProcess(Process):
    """x = x_0 + sigma eps, with timestep = scale log(sigma) (Karras et al. 2022, table 1).

    The data's deviation ``sigma_data`` is part of the SNR, as the noise axis assumes unit variance.
    """

    scale: float
    sigma_data: float

    kind = "EDM"

    def log_snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return 2 log(sigma_data / sigma)."""
        return 2 * (np.log(self.sigma_data) - timesteps / self.scale)


@dataclass(frozen=True)
class AngleProcess(Process):
    """x = cos(angle) x_0 + sin(angle) eps, with timestep = angle / unit.

    Salimans and Ho 2022; TrigFlow of Lu and Song 2025, which scales the noise like the data. The
    same holds where data keep their scale and sigma = tan(angle). ``unit`` is in radians, and
    ``sigma_data`` the data's deviation in units of the noise.
    """

    unit: float = 1.0
    sigma_data: float = 1.0

    kind = "trigonometric flow"

    def log_snr(self, timesteps: np.ndarray) -> np.ndarray:
        """Return 2 log(sigma_data / tan(angle))."""
        angle = np.clip(self.unit * timesteps, _TINY, np.pi / 2 - _TINY)
        return 2 * (np.log(self.sigma_data) - np.log(np.tan(angle)))


def _log_snr(log_alpha_bar: np.ndarray) -> np.ndarray:
    return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))


def _straight(s: np.ndarray) -> np.ndarray:
    s = np.clip(s, _TINY, 1 - _TINY)
    return 2 * (np.log1p(-s) - np.log(s))


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` (B,) shaped to broadcast over ``like`` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
