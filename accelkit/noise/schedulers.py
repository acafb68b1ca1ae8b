"""The process behind each scheduler: which one it is for the noise axis and for training.

A scheduler's process is found by the name of its class, or of a class it derives from; otherwise
by its features, sigmas of flow matching or a table of betas.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from accelkit.errors import AccelkitError
from accelkit.noise.processes import (
    PREDICTIONS,
    AngleProcess,
    Density,
    DiscreteProcess,
    EDMProcess,
    FlowProcess,
    FlowToDataProcess,
    ForwardProcess,
    Process,
    VPSDEProcess,
)


def process_of(scheduler: Any) -> Process:
    """Return the process of a diffusers scheduler, read from its configuration on the CPU.

    Raises:
        AccelkitError: a timestep of the scheduler does not determine the noise, or accelkit does
            not know its process.
    """
    if process := _known(scheduler):
        return process
    raise AccelkitError(
        f"cannot place {type(scheduler).__name__} on the noise axis: it has neither betas nor "
        "sigmas of flow matching at a single resolution, and accelkit knows no other process for "
        "it; pass scheduler= one that mixes data and noise as the model was trained"
    )


def forward_process(
    scheduler: Any, device: torch.device | str = "cpu", density: Density | None = None
) -> ForwardProcess:
    """Return the process that a diffusers scheduler trains on.

    Args:
        scheduler: scheduler of a pipeline.
        device: device of the process's tables.
        density: distribution of the positions on a straight path, uniform by default; timesteps of
            other processes are uniform.

    Raises:
        AccelkitError: training knows no process for the scheduler or its prediction type, or the
            density is not uniform and the process is not flow matching.
    """
    name, process = type(scheduler).__name__, _known(scheduler)
    if not isinstance(process, ForwardProcess):
        raise AccelkitError(
            "training needs a process with betas, a continuous VP-SDE or flow matching towards "
            f"noise, which {name} is not; give the pipeline the scheduler it was trained with"
        )
    if process.predicts not in PREDICTIONS:
        raise AccelkitError(
            f"training needs a model that predicts one of {', '.join(PREDICTIONS)}; its scheduler "
            f"has prediction_type {process.predicts!r}"
        )
    if density and density.name != "uniform":
        if not isinstance(process, FlowProcess):
            raise AccelkitError(
                f"the timesteps of {name} are drawn uniformly, but the timestep density is "
                f"{density.name}, which needs flow matching; leave it out"
            )
        process = replace(process, density=density)
    return process.to(device)


def _known(scheduler: Any) -> Process | None:
    if not hasattr(scheduler, "config"):
        return None
    names = _names(scheduler)
    return next((_READERS[name] for name in names if name in _READERS), _by_features)(scheduler)


def _by_features(scheduler: Any) -> Process | None:
    flow = any("FlowMatch" in name for name in _names(scheduler))
    return (
        _flow(scheduler) if flow or _is_set(scheduler, "use_flow_sigmas") else _discrete(scheduler)
    )


def _names(scheduler: Any) -> list[str]:
    """Return the names of the scheduler's class and of those it derives from."""
    return [kind.__name__ for kind in type(scheduler).__mro__]


def _is_set(scheduler: Any, option: str) -> bool:
    """Return whether an option of the scheduler's class is set.

    ``from_config`` also stores options of other classes, which have no effect.
    """
    own = option in inspect.signature(type(scheduler)).parameters
    return own and bool(scheduler.config.get(option, False))


def _discrete(scheduler: Any) -> Process | None:
    config = scheduler.config
    betas, alpha_bar = (getattr(scheduler, name, None) for name in ("betas", "alphas_cumprod"))
    if betas is None or alpha_bar is None or "beta_schedule" not in config:
        return None
    betas, alpha_bar = betas.double().cpu(), alpha_bar.double().cpu()
    # Use the betas where they determine the products, since rounding of float32 products moves
    # timesteps over an interval's edge. CogVideoX shifts and rescales the products alone.
    if not np.allclose(np.cumprod(1 - betas.numpy()), alpha_bar, rtol=2e-4, atol=1e-6):
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    name = "trained" if config.get("trained_betas") is not None else config["beta_schedule"]
    predicts = config.get("prediction_type", "epsilon")
    return DiscreteProcess(betas, predicts, f"discrete VP, {name} betas")


def _flow(scheduler: Any) -> Process | None:
    config = scheduler.config
    steps = config.get("num_train_timesteps", 1000)
    if config.get("stages", 1) != 1:  # a timestep means other noise at each stage's resolution
        return None
    if _is_set(scheduler, "invert_sigmas"):
        return FlowToDataProcess(steps)
    # A shift by resolution (FLUX) belongs to sampling; diffusers does not train with it either.
    if config.get("use_dynamic_shifting", False):
        return FlowProcess(steps)
    name = "flow_shift" if config.get("use_flow_sigmas", False) else "shift"
    return FlowProcess(steps, config.get(name, 1.0))


def _edm(scheduler: Any) -> Process:
    return EDMProcess(0.25, scheduler.config.sigma_data)


def _euler(scheduler: Any) -> Process | None:
    """Stable Video Diffusion gives its network log(sigma) / 4 and predicts v, for unit data."""
    config = scheduler.config
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        return EDMProcess(0.25, 1.0)
    return _by_features(scheduler)


def _vp_sde(scheduler: Any) -> Process:
    config = scheduler.config
    return VPSDEProcess(config.num_train_timesteps, config.beta_min, config.beta_max)


_READERS: dict[str, Callable[[Any], Process | None]] = {
    "CMStochasticIterativeScheduler": lambda s: EDMProcess(250, s.config.sigma_data),
    "CosineDPMSolverMultistepScheduler": lambda s: AngleProcess(np.pi / 2, s.config.sigma_data),
    "EDMDPMSolverMultistepScheduler": _edm,
    "EDMEulerScheduler": _edm,
    "EulerDiscreteScheduler": _euler,
    "FlowMapEulerDiscreteScheduler": _flow,
    "HeliosDMDScheduler": _flow,
    "HeliosScheduler": _flow,
    "IPNDMScheduler": lambda s: AngleProcess(np.pi / 2),
    "LTXEulerAncestralRFScheduler": _flow,
    "MiniMaxH3Scheduler": lambda s: FlowToDataProcess(1),
    "PiflowScheduler": _flow,
    "SCMScheduler": lambda s: AngleProcess(),
    "VPSDEScheduler": _vp_sde,
}
