"""The noise axis: where a timestep of any scheduler lies between data (0) and noise (1).

The axis is the position on the linear-beta variance-preserving process (beta from 1e-4 to 0.02
over 1,000 steps, Ho et al. 2020): level = index / 1000. Any other process is placed on it by equal
log-SNR, log(alpha^2 / sigma^2), so that a schedule means the same noise everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from accelkit.errors import AccelkitError

STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02

LogSnr = Callable[[np.ndarray], np.ndarray]


def vp_log_snr(betas: np.ndarray) -> np.ndarray:
    """Return the log-SNR after each step of a variance-preserving process, float64."""
    log_alpha_bar = np.cumsum(np.log1p(-np.asarray(betas, dtype=np.float64)))
    return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))


_REFERENCE = vp_log_snr(np.linspace(BETA_START, BETA_END, STEPS))
_LEVELS = np.arange(STEPS) / STEPS
_PURE_NOISE = -60.0


def level_of_log_snr(log_snr: np.ndarray) -> np.ndarray:
    """Return the noise level in [0, 1] of a log-SNR, float64.

    Linear in log-SNR between the 1,000 knots of the reference process and clamped outside them;
    a log-SNR below the last knot (terminal SNR of zero, say) is pure noise, level 1. Rounded to
    1e-6, far below a step's width and above what float32 betas disturb, so that an index on an
    interval's edge stays on its own side.
    """
    log_snr = np.asarray(log_snr, dtype=np.float64)
    levels = np.round(np.interp(-log_snr, -_REFERENCE, _LEVELS), 6)
    return np.where(log_snr < _REFERENCE[-1] - 1e-4, 1.0, levels)


class NoiseAxis:
    """Places the timesteps of one process on the axis.

    Args:
        log_snr: maps raw timesteps, float64 of any shape, to log-SNR.
        kind: what the process is, for people.

    ``level(timestep)`` is :meth:`levels` of a single timestep, remembered.
    """

    def __init__(self, log_snr: LogSnr, kind: str) -> None:
        self.kind = kind
        self._log_snr = log_snr
        self.level = lru_cache(maxsize=4096)(self._level)  # asked at every call of a model

    @classmethod
    def of(cls, scheduler: Any) -> NoiseAxis:
        """Return the axis of a diffusers scheduler, read from its configuration on the CPU.

        None stands for the reference process.

        Raises:
            AccelkitError: the scheduler has neither betas nor flow-matching or EDM sigmas.
        """
        if scheduler is None:
            return REFERENCE
        for reads in _PROCESSES:
            axis = reads(scheduler) if hasattr(scheduler, "config") else None
            if axis is not None:
                return axis
        raise AccelkitError(
            f"cannot place {type(scheduler).__name__} on the noise axis: it has neither betas nor "
            "flow-matching or EDM sigmas; pass scheduler= one that has"
        )

    def levels(self, timesteps: Iterable[float] | Any) -> list[float]:
        """Return the noise levels of raw timesteps (a sequence, array or tensor)."""
        raw = np.asarray(getattr(timesteps, "tolist", lambda: timesteps)(), dtype=np.float64)
        return level_of_log_snr(self._log_snr(np.atleast_1d(raw))).tolist()

    def _level(self, timestep: float) -> float:
        return self.levels([timestep])[0]


class _Knots:
    """Log-SNR at fractional timesteps of a discrete process: linear between whole ones."""

    def __init__(self, betas: np.ndarray) -> None:
        self._betas = betas

    @cached_property
    def _table(self) -> np.ndarray:
        with np.errstate(divide="ignore"):  # zero terminal SNR: log(0); finite, to interpolate
            return np.maximum(vp_log_snr(self._betas), _PURE_NOISE)

    def __call__(self, timesteps: np.ndarray) -> np.ndarray:
        return np.interp(timesteps, np.arange(len(self._table)), self._table)


def _flow(scheduler: Any) -> NoiseAxis | None:
    # x_t = (1 - s) x_0 + s noise with timestep = 1000 s (Liu et al. 2022); a shift changes only
    # which s a sampler visits, not what s means.
    config = scheduler.config
    flows = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False)
    if not flows:
        return None
    steps = config.get("num_train_timesteps", STEPS)

    def log_snr(timesteps: np.ndarray) -> np.ndarray:
        sigma = np.clip(timesteps / steps, 1e-12, 1 - 1e-12)
        return 2 * (np.log1p(-sigma) - np.log(sigma))

    return NoiseAxis(log_snr, "flow matching")


def _edm(scheduler: Any) -> NoiseAxis | None:
    # x = x_0 + sigma noise with timestep = log(sigma) / 4 (Karras et al. 2022, table 1); the data's
    # deviation is part of the SNR, since the reference process assumes unit variance.
    sigma_data = scheduler.config.get("sigma_data")
    if sigma_data is None or not type(scheduler).__name__.startswith("EDM"):
        return None
    return NoiseAxis(lambda timesteps: 2 * (np.log(sigma_data) - 4 * timesteps), "EDM")


def _discrete(scheduler: Any) -> NoiseAxis | None:
    betas, config = getattr(scheduler, "betas", None), scheduler.config
    timesteps_are_log_sigma = (
        config.get("timestep_type") == "continuous"
        and config.get("prediction_type") == "v_prediction"
    )
    if betas is None or "beta_schedule" not in config or timesteps_are_log_sigma:
        return None
    kind = f"discrete VP, {config['beta_schedule']} betas"
    return NoiseAxis(_Knots(betas.double().cpu().numpy()), kind)


_PROCESSES = (_flow, _edm, _discrete)

REFERENCE = NoiseAxis(_Knots(np.linspace(BETA_START, BETA_END, STEPS)), "linear betas")
"""The axis of the reference process itself: level = timestep / 1000."""
