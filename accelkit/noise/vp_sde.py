"""Samplers of the continuous variance-preserving SDE, as the U-ViT paper uses it.

dx = -beta(t)/2 x dt + sqrt(beta(t)) dw with beta(t) rising linearly from 0.1 to 20 over t in [0, 1]
(Song et al. 2021, eq. 11 and appendix C): the limit of the 1,000 linear betas of Ho et al. 2020,
abar(t) = exp(-0.1 t - 9.95 t^2). A timestep is the index of that discrete process, 1000 t - 1, here
possibly a fraction: index i has taken i + 1 steps of noise.

diffusers has single-step DPM-Solvers of the same orders, but for a table of betas: they round every
timestep to a whole one, although six of the paper's 50 calls are below timestep 1, and space their
evaluations rather than their intervals evenly.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from accelkit.errors import AccelkitError
from accelkit.noise.processes import VPSDEProcess

Generators = torch.Generator | list[torch.Generator] | None


class VPSDEScheduler(SchedulerMixin, ConfigMixin):
    """Base class of the samplers, for networks that predict the noise.

    Args:
        num_train_timesteps: T, number of whole timesteps in t from 0 to 1.
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.

    Attributes:
        timesteps: timesteps of the network's calls, falling, float32 of shape (steps,): T t - 1.
        init_noise_sigma: deviation of the noise that sampling starts from.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0
    ) -> None:
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._times: list[float] = []  # one for each timestep, and the end of the last step
        self._begin_index: int | None = None
        self._step_index: int | None = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @property
    def step_index(self) -> int | None:
        """Index of the next timestep, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first timestep, None if it is found by its value."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later timestep, as image-to-image pipelines do."""
        self._begin_index = begin_index

    @property
    def process(self) -> VPSDEProcess:
        """The process that is sampled."""
        return VPSDEProcess(len(self), self.config.beta_min, self.config.beta_max)

    def log_alpha_bar(self, t: Any) -> Any:
        """Return log abar at times ``t`` in [0, 1], a number or float64 array."""
        return self.process.log_alpha_bar(t)

    def discrete_betas(self) -> list[float]:
        """Return the T betas of the discrete process with equal noise at every whole timestep."""
        ends = self.log_alpha_bar(np.arange(len(self) + 1) / len(self))
        return (-np.expm1(np.diff(ends))).tolist()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return ``sample`` unchanged."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(abar) x_0 + sqrt(1 - abar) noise.

        Args:
            original_samples: x_0, of shape (B, ...).
            noise: standard normal, shaped as x_0.
            timesteps: whole or not, one or one per sample (B,).
        """
        t = (timesteps.double().reshape(-1) + 1) / len(self)
        log_alpha_bar = self.log_alpha_bar(t).view(-1, *[1] * (original_samples.ndim - 1))
        signal, sigma = torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))
        return signal.to(original_samples) * original_samples + sigma.to(noise) * noise

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Set the timesteps of a run.

        Args:
            num_inference_steps: number of calls of the network.
            device: device of the timesteps.

        Raises:
            AccelkitError: fewer steps than the sampler needs.
        """
        times = self._grid(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._times = times.tolist()
        timesteps = len(self) * times[:-1] - 1
        self.timesteps = torch.from_numpy(timesteps).to(device=device, dtype=torch.float32)
        self._step_index = self._begin_index = None

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take one step to less noise.

        Args:
            model_output: the predicted noise, of shape (B, ...).
            timestep: timestep of the network's call; read in the first step alone.
            sample: input of the network's call, shaped as its output.
            generator: source of the noise that is added, if any; one, or one per sample.
            return_dict: whether to return an object rather than a tuple.

        Returns:
            ``.prev_sample``.

        Raises:
            AccelkitError: :meth:`set_timesteps` has not been called, or all steps are taken.
        """
        if self._step_index is None:
            first = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if first is None else first
        if self._step_index >= len(self._times) - 1:
            raise AccelkitError("no step is left to take; call set_timesteps")
        previous = self._step(self._step_index, model_output, sample, generator)
        self._step_index += 1
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def index_for_timestep(self, timestep: Tensor | float) -> int:
        """Return the index of the nearest timestep."""
        return int((self.timesteps - float(timestep)).abs().argmin())

    @abstractmethod
    def _grid(self, steps: int) -> np.ndarray:
        """Return the falling times of ``steps`` calls and the end of the last step, float64."""

    @abstractmethod
    def _step(self, index: int, eps: Tensor, x: Tensor, generator: Generators) -> Tensor: ...


class VPSDEEulerMaruyamaScheduler(VPSDEScheduler):
    """Euler-Maruyama on the reverse SDE (Bao et al. 2023: 1,000 steps for pixel models).

    Times are evenly spaced from 1 to 1e-3; from there the last step goes to 0 without noise.
    """

    def _grid(self, steps: int) -> np.ndarray:
        if steps < 2:
            raise AccelkitError(f"Euler-Maruyama takes at least 2 steps, got {steps}")
        return np.append(np.linspace(1e-3, 1, steps)[::-1], 0.0)

    def _step(self, index: int, eps: Tensor, x: Tensor, generator: Generators) -> Tensor:
        t, s = self._times[index], self._times[index + 1]
        beta = self.process.beta(t)
        sigma = float(np.sqrt(-np.expm1(self.log_alpha_bar(t))))
        mean = x + beta * (t - s) * (x / 2 - eps / sigma)  # the score is -eps / sigma
        if s == 0:
            return mean
        z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return mean + float(np.sqrt(beta * (t - s))) * z


class VPSDEDPMSolverScheduler(VPSDEScheduler):
    """Single-step DPM-Solver of order 3 on the probability-flow ODE (Lu et al. 2022, algorithm 2).

    The U-ViT paper samples with it in 50 calls. Intervals are even in log-SNR from t = 1 to 1e-4
    and take three calls each; the last ones take the rest, so that the number of calls is exactly
    the one given. No step is needed from 1e-4 to 0.
    """

    def _grid(self, steps: int) -> np.ndarray:
        if steps < 1:
            raise AccelkitError(f"DPM-Solver takes at least 1 step, got {steps}")
        orders = [3] * (steps // 3) + [steps % 3] if steps % 3 else [3] * (steps // 3 - 1) + [2, 1]
        self._orders = [order for order in orders for _ in range(order)]
        self._starts = [call == 0 for order in orders for call in range(order)]
        self._calls: list[tuple[float, Tensor]] = []
        first, last = self._half_log_snr(np.array([1.0, 1e-4]))
        ends = np.linspace(first, last, len(orders) + 1)
        evenly = [
            np.linspace(a, b, n, endpoint=False)
            for a, b, n in zip(ends, ends[1:], orders, strict=False)
        ]
        return self._time(np.append(np.concatenate(evenly), ends[-1]))

    def _step(self, index: int, eps: Tensor, x: Tensor, generator: Generators) -> Tensor:
        lambdas = self._half_log_snr(np.array(self._times[index : index + 2]))
        # A run may begin in the middle of an interval.
        if self._starts[index] or not self._calls:
            self._calls, self._x = [], x
        self._calls.append((lambdas[0], eps))
        start, first = self._calls[0]
        h = lambdas[1] - start
        # abar = sigmoid(2 lambda)
        signal, before = (np.exp(-np.logaddexp(0, -2 * v) / 2) for v in (lambdas[1], start))
        sigma = np.exp(-np.logaddexp(0, 2 * lambdas[1]) / 2)
        ahead = float(signal / before) * self._x - float(sigma * np.expm1(h)) * first
        if len(self._calls) == 1:
            return ahead
        at, last = self._calls[-1]
        # An interval of order 2 takes the midpoint rule, one of order 3 the exact form within.
        weight = np.expm1(h) / 2 if self._orders[index] == 2 else np.expm1(h) / h - 1
        return ahead - float(sigma * weight * h / (at - start)) * (last - first)

    def _half_log_snr(self, t: np.ndarray) -> np.ndarray:
        log_alpha_bar = self.log_alpha_bar(t)
        return (log_alpha_bar - np.log(-np.expm1(log_alpha_bar))) / 2

    def _time(self, half_log_snr: np.ndarray) -> np.ndarray:
        """Return the times of half log-SNRs, where -log abar(t), a parabola, has their values."""
        low, slope = self.config.beta_min, self.config.beta_max - self.config.beta_min
        integral = np.logaddexp(0, -2 * half_log_snr)
        return 2 * integral / (low + np.sqrt(low**2 + 2 * slope * integral))
