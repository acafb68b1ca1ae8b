"""What the timesteps of each of diffusers' schedulers mean: the log-SNR of a process there.

A reader for every kind of process, found by the name of the scheduler's class or of one that it
derives from. What no reader is registered for is read by what it offers: sigmas of flow matching,
or a table of betas. A process whose timesteps do not tell the noise is refused with a reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from accelkit.errors import AccelkitError

LogSnr = Callable[[np.ndarray], np.ndarray]


class Process(NamedTuple):
    """A forward process x = a x_0 + b noise of data of unit variance.

    Attributes:
        log_snr: maps a scheduler's timesteps, float64 of any shape, to log(a^2 / b^2).
        kind: what it is, for people.
    """

    log_snr: LogSnr
    kind: str


def process_of(scheduler: Any) -> Process:
    """Return the process of a diffusers scheduler, read from its configuration on the CPU.

    Raises:
        AccelkitError: its timesteps do not tell the noise, or nothing is known of them.
    """
    kind = type(scheduler)
    names = [c.__name__ for c in kind.__mro__]
    reason = next((_REFUSED[name] for name in names if name in _REFUSED), _UNKNOWN)
    if hasattr(scheduler, "config") and reason is _UNKNOWN:
        reads = next((_READERS[name] for name in names if name in _READERS), _by_features)
        process = reads(scheduler)
        if isinstance(process, Process):
            return process
        reason = process or _UNKNOWN
    raise AccelkitError(
        f"cannot place {kind.__name__} on the noise axis: {reason}; "
        "pass scheduler= one that mixes data and noise as the model was trained"
    )


def vp_log_snr(betas: np.ndarray) -> np.ndarray:
    """Return the log-SNR after each step of a variance-preserving process, float64."""
    log_alpha_bar = np.cumsum(np.log1p(-np.asarray(betas, dtype=np.float64)))
    return _of_log_alpha_bar(log_alpha_bar)


def knots(table: np.ndarray) -> LogSnr:
    """Return the log-SNR between whole timesteps, linear between the values of ``table`` there."""
    finite = np.clip(table, -_PURE, _PURE)  # an SNR of zero or of infinity, to interpolate
    return lambda timesteps: np.interp(timesteps, np.arange(len(finite)), finite)


Reader = Callable[[Any], Process | str | None]
_PURE = 60.0
_TINY = 1e-12


def _of_log_alpha_bar(log_alpha_bar: np.ndarray) -> np.ndarray:
    return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))


def _betas(scheduler: Any) -> Process | None:
    """A discrete variance-preserving process (Ho et al. 2020), its timestep the index."""
    tables = [getattr(scheduler, name, None) for name in ("betas", "alphas_cumprod")]
    known = [table.double().cpu().numpy() for table in tables if table is not None]
    if len(known) < 2 or "beta_schedule" not in scheduler.config:
        return None
    betas, alpha_bar = known
    with np.errstate(divide="ignore"):  # a terminal SNR of zero
        # from the betas where they tell all, since float32 products disturb an interval's edges;
        # CogVideoX shifts and rescales the products alone
        if np.allclose(np.cumprod(1 - betas), alpha_bar, rtol=2e-4, atol=1e-6):
            table = vp_log_snr(betas)
        else:
            table = np.log(alpha_bar) - np.log1p(-alpha_bar)
    trained = scheduler.config.get("trained_betas") is not None
    name = "trained" if trained else scheduler.config["beta_schedule"]
    return Process(knots(table), f"discrete VP, {name} betas")


def _flow(scheduler: Any) -> Process:
    """The straight path x = (1 - s) x_0 + s noise, timestep T s (Liu et al. 2022).

    A shift, static or by resolution, changes which s a sampler visits, not what s means. With
    inverted sigmas (Mochi) time runs from noise, 0, to data, T.
    """
    steps = scheduler.config.get("num_train_timesteps", 1000)
    if _takes(scheduler, "invert_sigmas"):
        return Process(lambda timesteps: _straight(1 - timesteps / steps), "flow matching")
    return Process(lambda timesteps: _straight(timesteps / steps), "flow matching")


def _flow_to_data(scheduler: Any) -> Process:
    """The straight path with the timestep running from noise, 0, to data, 1."""
    return Process(lambda timesteps: _straight(1 - timesteps), "flow matching")


def _straight(s: np.ndarray) -> np.ndarray:
    s = np.clip(s, _TINY, 1 - _TINY)
    return 2 * (np.log1p(-s) - np.log(s))


def _staged_flow(scheduler: Any) -> Process | str:
    if scheduler.config.stages == 1:
        return _flow(scheduler)
    return "each of its stages has a resolution of its own, where a timestep means other noise"


def _log_sigma(scale: float, sigma_data: float | None = None) -> Reader:
    """x = x_0 + sigma noise, timestep ``scale`` log(sigma) (Karras et al. 2022, table 1).

    The data's deviation is part of the SNR, since the axis assumes unit variance.
    """

    def read(scheduler: Any) -> Process:
        deviation = sigma_data or scheduler.config.sigma_data
        return Process(lambda timesteps: 2 * (np.log(deviation) - timesteps / scale), "EDM")

    return read


def _angle(unit: float, sigma_data: Callable[[Any], float] = lambda config: 1.0) -> Reader:
    """The timestep is an angle in ``unit`` radians whose tangent is the noise's deviation.

    That is sigma where data keep their scale, and sine over cosine in x = cos x_0 + sin noise
    (Salimans and Ho 2022; TrigFlow of Lu and Song 2025, which scales the noise like the data).
    """

    def read(scheduler: Any) -> Process:
        deviation = sigma_data(scheduler.config)

        def log_snr(timesteps: np.ndarray) -> np.ndarray:
            angle = np.clip(unit * timesteps, _TINY, np.pi / 2 - _TINY)
            return 2 * (np.log(deviation) - np.log(np.tan(angle)))

        return Process(log_snr, "trigonometric flow")

    return read


def _euler(scheduler: Any) -> Process | str | None:
    """Stable Video Diffusion gives its network log(sigma) / 4 and predicts v, for unit data."""
    config = scheduler.config
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        return _log_sigma(0.25, 1.0)(scheduler)
    return _by_features(scheduler)


def _wuerstchen(scheduler: Any) -> Process:
    """The cosine process (Nichol and Dhariwal 2021, eq. 17) in continuous time 0..1, warped."""
    s, warp = scheduler.config.s, scheduler.config.scaler

    def log_snr(timesteps: np.ndarray) -> np.ndarray:
        t = np.clip(timesteps, 0, 1)
        t = 1 - (1 - t) ** warp if warp > 1 else t**warp
        alpha_bar = (np.cos((t + s) / (1 + s) * np.pi / 2) / np.cos(s / (1 + s) * np.pi / 2)) ** 2
        return _of_log_alpha_bar(np.log(np.clip(alpha_bar, 1e-4, 0.9999)))

    return Process(log_snr, "continuous VP, cosine")


def _vp_sde(scheduler: Any) -> Process:
    """The VP SDE (Song et al. 2021, eq. 11) in continuous time (timestep + 1) / T."""
    config = scheduler.config
    steps, low, high = config.num_train_timesteps, config.beta_min, config.beta_max

    def log_snr(timesteps: np.ndarray) -> np.ndarray:
        t = np.maximum((timesteps + 1) / steps, _TINY)
        return _of_log_alpha_bar(-(low * t + (high - low) * t**2 / 2))

    return Process(log_snr, "continuous VP, linear beta")


def _by_features(scheduler: Any) -> Process | None:
    if _takes(scheduler, "use_flow_sigmas") or "FlowMatch" in type(scheduler).__name__:
        return _flow(scheduler)
    return _betas(scheduler)


def _takes(scheduler: Any, option: str) -> bool:
    """Whether an option is set, and one of this class; from_config hands on those of others."""
    mine = option in inspect.signature(type(scheduler)).parameters
    return mine and bool(scheduler.config.get(option, False))


_READERS: dict[str, Reader] = {
    "CMStochasticIterativeScheduler": _log_sigma(250),
    "CosineDPMSolverMultistepScheduler": _angle(np.pi / 2, lambda config: config.sigma_data),
    "DDPMWuerstchenScheduler": _wuerstchen,
    "EDMDPMSolverMultistepScheduler": _log_sigma(0.25),
    "EDMEulerScheduler": _log_sigma(0.25),
    "EulerDiscreteScheduler": _euler,
    "FlowMapEulerDiscreteScheduler": _flow,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "FlowMatchLCMScheduler": _flow,
    "HeliosDMDScheduler": _staged_flow,
    "HeliosScheduler": _staged_flow,
    "IPNDMScheduler": _angle(np.pi / 2),
    "LTXEulerAncestralRFScheduler": _flow,
    "MiniMaxH3Scheduler": _flow_to_data,
    "PiflowScheduler": _flow,
    "SCMScheduler": _angle(1.0),
    "VPSDEScheduler": _vp_sde,
}

_TOKENS = "it replaces discrete tokens, there is no SNR"
_SIGMAS = "its networks are given sigmas in place of its timesteps"
_UNKNOWN = "it has neither betas nor sigmas of flow matching, and no other process is known for it"

_REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "ConsistencyDecoderScheduler": "it decodes latents to pixels rather than generating",
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "KarrasVeScheduler": _SIGMAS,
    "RFD4ProteinaScheduler": "its model has a time for each of two parts of a sample",
    "ScoreSdeVeScheduler": _SIGMAS,
    "ScoreSdeVpScheduler": "what its networks are given of its time is up to the loop around it",
    "VQDiffusionScheduler": _TOKENS,
}
