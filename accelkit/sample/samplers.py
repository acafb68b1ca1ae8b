"""The samplers accelkit offers by name: diffusers' schedulers and two of the continuous VP SDE."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np

from accelkit.errors import AccelkitError
from accelkit.models.vp_sde import (
    VPSDEDPMSolverScheduler,
    VPSDEEulerMaruyamaScheduler,
    VPSDEScheduler,
)
from accelkit.noise import NoiseAxis

SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "dpm-fast": "DPMSolverSinglestepScheduler",
    "em": "VPSDEEulerMaruyamaScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
}
"""Ancestral sampling (Ho et al. 2020), DDIM (Song et al. 2021), DPM-Solver++ in several steps and
in single ones of order 3 (Lu et al. 2022), Euler-Maruyama on the continuous VP SDE (Song et al.
2021), Euler on the flow-matching ODE (Liu et al. 2022) without a shift that follows the resolution.

On the continuous VP SDE ``dpm-fast`` is the DPM-Solver that the U-ViT paper samples with; ``ddpm``,
``ddim`` and ``dpm`` run on the betas that have its noise at whole timesteps."""

AUTO = "auto"
STOCHASTIC = ("ddpm", "em")
"""Samplers that keep adding noise, and take generators for it."""

_CONTINUOUS: dict[str, type[VPSDEScheduler]] = {
    "dpm-fast": VPSDEDPMSolverScheduler,
    "em": VPSDEEulerMaruyamaScheduler,
}

_PROCESS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"}


def make_sampler(name: str, scheduler: Any, steps: int, learned_variance: bool = False) -> Any:
    """Return a sampler for the process that ``scheduler`` describes, set to ``steps`` steps.

    Args:
        name: a key of :data:`SAMPLERS`, or ``auto`` (:func:`resolved`).
        scheduler: a pipeline's scheduler; it is left as it is.
        steps: network calls per image without guidance.
        learned_variance: the network predicts a variance, which ancestral sampling then uses.

    Raises:
        AccelkitError: unknown sampler, one that does not follow the process, or a number of steps
            that the process does not have.
    """
    name = resolved(name, scheduler)
    whole = range(scheduler.config.get("num_train_timesteps", 1000))
    # the last interval of DPM-Solver would have no width
    longest = len(whole) - name.startswith("dpm")
    if not 1 <= steps <= longest:
        raise AccelkitError(f"{steps} sampling steps asked for; give 1 to {longest}")
    sampler = _follow(name, scheduler, _options(name, scheduler, learned_variance))
    axis = NoiseAxis.of(scheduler)
    if not np.allclose(NoiseAxis.of(sampler).levels(whole), axis.levels(whole), atol=1e-4):
        raise AccelkitError(
            f"the sampler {name} does not follow the process of {type(scheduler).__name__} "
            f"({axis.kind}); {resolved(AUTO, scheduler)} does, or sample with the pipeline itself"
        )
    sampler.set_timesteps(steps)
    return sampler


def resolved(name: str, scheduler: Any) -> str:
    """Return a sampler's name; for ``auto`` that of the deterministic one of the model's process.

    Raises:
        AccelkitError: it is unknown.
    """
    if name == AUTO:
        return "flow" if "flow matching" in NoiseAxis.of(scheduler).kind else "ddim"
    if name not in SAMPLERS:
        raise AccelkitError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return name


def _follow(name: str, scheduler: Any, options: dict[str, Any]) -> Any:
    """Build a sampler as close to ``scheduler`` as it can be described to it.

    Defaults are each sampler's own unless they are of the process.
    """
    config, vp_sde = scheduler.config, isinstance(scheduler, VPSDEScheduler)
    defaults = set(config.get("_use_default_values", ())) - _PROCESS
    described = {key: value for key, value in config.items() if key not in defaults} | options
    kind: Any = _CONTINUOUS.get(name) if vp_sde or name == "em" else None
    if kind is None:
        kind = getattr(diffusers, SAMPLERS[name])
        if vp_sde:
            described["trained_betas"] = scheduler.discrete_betas()
            described["timestep_spacing"] = "trailing"  # from pure noise on
    takes = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in described.items() if key in takes})


def _options(name: str, scheduler: Any, learned_variance: bool) -> dict[str, Any]:
    # how a resolution shifts the steps is known to the pipeline alone
    options: dict[str, Any] = {"variance_type": None, "use_dynamic_shifting": False}
    if name == "ddpm":
        options["variance_type"] = "learned_range" if learned_variance else "fixed_small"
    if "flow_shift" in scheduler.config:  # as solvers call it that can do flow matching too
        options["shift"] = scheduler.config["flow_shift"]
    if name.startswith("dpm"):
        options |= {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    # a default that clips is nothing that latents bear
    options["clip_sample"] = scheduler.config.get("clip_sample", False)
    if name == "dpm-fast":
        options |= {"solver_order": 3, "lower_order_final": True}
    return options
