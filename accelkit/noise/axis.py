"""The noise axis: the place of a timestep of any scheduler between data (0) and noise (1).

The axis is the position on the linear-beta variance-preserving process (beta from 1e-4 to 0.02
over 1,000 steps, Ho et al. 2020): level = index / 1000. Any other process is placed on it by equal
log-SNR, log(a^2 / b^2), so that a schedule means the same noise everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from accelkit.noise.processes import DiscreteProcess, Process
from accelkit.noise.schedulers import process_of

STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02

_BETAS = torch.from_numpy(np.linspace(BETA_START, BETA_END, STEPS))
_REFERENCE = DiscreteProcess(_BETAS, kind="linear betas")
_LEVELS = np.arange(STEPS) / STEPS


def level_of_log_snr(log_snr: np.ndarray) -> np.ndarray:
    """Return the noise level in [0, 1] of a log-SNR, float64.

    Linear in log-SNR between the 1,000 knots of the reference process and clamped outside them;
    a log-SNR below the last knot (terminal SNR of zero, say) is pure noise, level 1. Levels are
    rounded to 1e-6, far below a step's width and above the error of float32 betas, so that an index
    on an interval's edge stays on its own side.
    """
    log_snr = np.asarray(log_snr, dtype=np.float64)
    table = _REFERENCE.log_snr_table
    levels = np.round(np.interp(-log_snr, -table, _LEVELS), 6)
    return np.where(log_snr < table[-1] - 1e-4, 1.0, levels)


def reference_process() -> Any:
    """Return the DDIMScheduler of the reference process, which is DiT's own."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=BETA_START, beta_end=BETA_END, beta_schedule="linear", clip_sample=False
    )


class NoiseAxis:
    """Places the timesteps of one process on the axis.

    ``level(timestep)`` is :meth:`levels` of a single timestep, cached.

    Args:
        process: the process.

    Attributes:
        kind: name of the process, for messages.
    """

    def __init__(self, process: Process) -> None:
        self.kind = process.kind
        self._log_snr = process.log_snr
        self.level = lru_cache(maxsize=4096)(self._level)  # every call of a model needs it

    @classmethod
    def of(cls, scheduler: Any) -> NoiseAxis:
        """Return the axis of a diffusers scheduler, read from its configuration on the CPU.

        None stands for the reference process.

        Raises:
            AccelkitError: a timestep of the scheduler does not determine the noise, or accelkit
                does not know its process.
        """
        return REFERENCE if scheduler is None else cls(process_of(scheduler))

    def levels(self, timesteps: Iterable[float] | Any) -> list[float]:
        """Return the noise levels of raw timesteps (a sequence, array or tensor)."""
        raw = np.asarray(getattr(timesteps, "tolist", lambda: timesteps)(), dtype=np.float64)
        return level_of_log_snr(self._log_snr(np.atleast_1d(raw))).tolist()

    def _level(self, timestep: float) -> float:
        return self.levels([timestep])[0]


REFERENCE = NoiseAxis(_REFERENCE)
"""The axis of the reference process itself: level = timestep / 1000."""
