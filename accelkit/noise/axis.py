"""The noise axis: where a timestep of any scheduler lies between data (0) and noise (1).

The axis is the position on the linear-beta variance-preserving process (beta from 1e-4 to 0.02
over 1,000 steps, Ho et al. 2020): level = index / 1000. Any other process is placed on it by equal
log-SNR, log(alpha^2 / sigma^2), so that a schedule means the same noise everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from accelkit.noise.processes import LogSnr, knots, process_of, vp_log_snr

STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02

_REFERENCE = vp_log_snr(np.linspace(BETA_START, BETA_END, STEPS))
_LEVELS = np.arange(STEPS) / STEPS


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


def reference_process() -> Any:
    """Return diffusers' DDIMScheduler of the process that the axis is made of, DiT's own."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear", clip_sample=False
    )


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
            AccelkitError: its timesteps do not tell the noise, or nothing is known of them.
        """
        return REFERENCE if scheduler is None else cls(*process_of(scheduler))

    def levels(self, timesteps: Iterable[float] | Any) -> list[float]:
        """Return the noise levels of raw timesteps (a sequence, array or tensor)."""
        raw = np.asarray(getattr(timesteps, "tolist", lambda: timesteps)(), dtype=np.float64)
        return level_of_log_snr(self._log_snr(np.atleast_1d(raw))).tolist()

    def _level(self, timestep: float) -> float:
        return self.levels([timestep])[0]


REFERENCE = NoiseAxis(knots(_REFERENCE), "linear betas")
"""The axis of the reference process itself: level = timestep / 1000."""
