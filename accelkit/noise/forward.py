"""Forward processes: how data become noise, at which timesteps, and what a network says of it.

Every process mixes linearly, x_t = a(t) x_0 + b(t) eps, and every prediction type is a linear
combination of the same two, p x_0 + q eps. So a process is its two coefficients and how its
timesteps are drawn; a scheduler finds its process in a short registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accelkit.errors import AccelkitError

Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

PREDICTIONS: dict[str, Coefficients] = {
    "epsilon": lambda a, b: (torch.zeros_like(a), torch.ones_like(b)),
    "v_prediction": lambda a, b: (-b, a),
    "sample": lambda a, b: (torch.ones_like(a), torch.zeros_like(b)),
    "flow_prediction": lambda a, b: (-torch.ones_like(a), torch.ones_like(b)),
}
"""What a network predicts, as factors p of the data and q of the noise, from a and b.

The noise (Ho et al. 2020, eq. 14), v (Salimans and Ho 2022, appendix D), the data, and the
velocity of the straight path (Lipman et al. 2023; Esser et al. 2024, eq. 3).
"""


@dataclass(frozen=True)
class Density:
    """How the position on a straight path is drawn, before the scheduler's shift.

    Attributes:
        name: ``uniform``, or ``logit-normal``: the logistic function of a normal variable
            (Esser et al. 2024, eq. 19).
        mean, std: of that normal variable; 0 and 1 for SD3.
    """

    name: str = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` positions in [0, 1], float32."""
        if self.name == "uniform":
            return torch.rand(count, generator=rng)
        return torch.sigmoid(self.mean + self.std * torch.randn(count, generator=rng))


class ForwardProcess(ABC):
    """A forward process x_t = a(t) x_0 + b(t) eps, and what a network trained on it predicts.

    Timesteps are the scheduler's own numbers, as :class:`accelkit.noise.axis.NoiseAxis` reads them.

    Args:
        predicts: a key of :data:`PREDICTIONS`.

    Attributes:
        span: between which two timesteps those of training lie.
        whole: whether they are whole numbers, the second of ``span`` excluded.

    Raises:
        AccelkitError: another prediction type.
    """

    span: tuple[float, float]
    whole: bool = False

    def __init__(self, predicts: str = "epsilon") -> None:
        if predicts not in PREDICTIONS:
            raise AccelkitError(
                f"training knows models that predict {', '.join(PREDICTIONS)}; this one's "
                f"scheduler has prediction_type {predicts!r}"
            )
        self.predicts = predicts

    @abstractmethod
    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` timesteps drawn for training, on the CPU."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b at timesteps ``t`` (B,), each (B,) float32 on t's device."""

    def _shaped(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.coefficients(t)
        ones = [1] * (like.ndim - 1)
        return a.view(-1, *ones), b.view(-1, *ones)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t, shaped as ``x0`` (B, C, H, W), at the timesteps ``t`` (B,)."""
        a, b = self._shaped(t, x0)
        return a * x0 + b * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the network is to predict, shaped as ``x0`` (B, C, H, W)."""
        p, q = PREDICTIONS[self.predicts](*self._shaped(t, x0))
        return p * x0 + q * eps

    def data_of(self, predicted: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Return the x_0 that a prediction at ``xt`` amounts to, shaped as both."""
        a, b = self._shaped(t, xt)
        p, q = PREDICTIONS[self.predicts](a, b)
        return (q * xt - b * predicted) / (a * q - b * p)


class DiscreteProcess(ForwardProcess):
    """The variance-preserving forward process of T steps, with what its losses need.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for t = 0 .. T-1, where t = 0 has one step of
    noise already (Ho et al. 2020, eq. 4). Tables are computed in float64 and kept in float32.

    Args:
        betas: shape (T,), the noise added at each step.
        device: where the tables live.
        predicts: a key of :data:`PREDICTIONS`.
    """

    whole = True

    def __init__(
        self, betas: Tensor, device: torch.device | str = "cpu", predicts: str = "epsilon"
    ) -> None:
        super().__init__(predicts)
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
        self.span = (0, self.steps)
        self._tables = {
            name: torch.tensor(table, dtype=torch.float32, device=device)
            for name, table in tables.items()
        }

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` whole timesteps, int64, uniform over the process."""
        return torch.randint(self.steps, (count,), generator=rng)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar) at whole timesteps."""
        return self._tables["signal"][t], self._tables["noise"][t]

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return the named table at ``t`` (B,), shaped to broadcast over ``like`` (B, ...)."""
        return self._tables[name][t].view(-1, *[1] * (like.ndim - 1))


class FlowProcess(ForwardProcess):
    """The straight path x_t = (1 - s) x_0 + s eps, with timestep = T s.

    Liu et al. 2022; the positions are drawn from a density and shifted as the scheduler shifts its
    own, s -> shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23).

    Args:
        steps: T.
        shift: towards noise; 1 is none.
        density: of the positions before the shift.
        predicts: a key of :data:`PREDICTIONS`.
    """

    def __init__(
        self,
        steps: int = 1000,
        shift: float = 1.0,
        density: Density | None = None,
        predicts: str = "flow_prediction",
    ) -> None:
        super().__init__(predicts)
        self.steps, self.shift, self.density = steps, shift, density or Density()
        self.span = (0, steps)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` timesteps in [0, T], float32."""
        s = self.density(count, rng)
        return self.steps * (self.shift * s / (1 + (self.shift - 1) * s))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 - s and s."""
        s = t.float() / self.steps
        return 1 - s, s


class VPSDEProcess(ForwardProcess):
    """The variance-preserving SDE in continuous time (Song et al. 2021, eq. 11).

    beta(t) = low + (high - low) t for t in [0, 1]; abar(t) = exp(-integral of beta). Timesteps are
    T t - 1, so that whole ones are those of the discrete process with the same limit.

    Args:
        steps: T.
        low, high: beta at 0 and at 1.
    """

    def __init__(self, steps: int = 1000, low: float = 0.1, high: float = 20.0) -> None:
        super().__init__("epsilon")
        self.steps, self.low, self.high = steps, low, high
        self.span = (-1, steps - 1)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """Return ``count`` timesteps, float32, of times uniform in [0, 1]."""
        return self.steps * torch.rand(count, generator=rng) - 1

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar)."""
        time = (t.float() + 1) / self.steps
        log_alpha_bar = -(self.low * time + (self.high - self.low) * time.square() / 2)
        return (0.5 * log_alpha_bar).exp(), (-torch.expm1(log_alpha_bar)).sqrt()


def forward_process(
    scheduler: Any, device: torch.device | str = "cpu", density: Density | None = None
) -> ForwardProcess:
    """Return the process a diffusers scheduler was configured for.

    Args:
        scheduler: a pipeline's.
        device: where tables live.
        density: how positions on a straight path are drawn; other processes draw uniformly.

    Raises:
        AccelkitError: training knows no process for the scheduler or its prediction type, or a
            density other than uniform is asked of another process than flow matching.
    """
    density = density or Density()
    for reads in _PROCESSES:
        process = reads(scheduler, device, density) if hasattr(scheduler, "config") else None
        if process is None:
            continue
        if density.name != "uniform" and not isinstance(process, FlowProcess):
            raise AccelkitError(
                f"timesteps of {type(scheduler).__name__} are drawn uniformly; the density "
                f"{density.name} is one of flow matching"
            )
        return process
    raise AccelkitError(
        f"training needs a process with betas, a continuous VP-SDE or flow matching, which "
        f"{type(scheduler).__name__} is not; give the pipeline the scheduler it was trained with"
    )


def _flow(scheduler: Any, device: Any, density: Density) -> ForwardProcess | None:
    config = scheduler.config
    solver = config.get("use_flow_sigmas", False)
    if not solver and "FlowMatch" not in type(scheduler).__name__:
        return None
    # a shift that follows the resolution (FLUX) is the sampler's alone, also where diffusers trains
    moves = not config.get("use_dynamic_shifting", False)
    shift = config.get("flow_shift" if solver else "shift", 1.0) if moves else 1.0
    return FlowProcess(config.num_train_timesteps, shift, density)


def _vp_sde(scheduler: Any, device: Any, density: Density) -> ForwardProcess | None:
    config = scheduler.config
    if all(kind.__name__ != "VPSDEScheduler" for kind in type(scheduler).__mro__):
        return None
    return VPSDEProcess(config.num_train_timesteps, config.beta_min, config.beta_max)


def _discrete(scheduler: Any, device: Any, density: Density) -> ForwardProcess | None:
    betas, config = getattr(scheduler, "betas", None), scheduler.config
    if betas is None or "beta_schedule" not in config:
        return None
    return DiscreteProcess(betas, device, config.get("prediction_type", "epsilon"))


_PROCESSES = (_flow, _vp_sde, _discrete)
