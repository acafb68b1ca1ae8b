"""The samplers accelkit offers by name: diffusers' schedulers and two of the continuous VP SDE.

A sampler visits the timesteps that the pipeline's own call visits with it: spacing, offset, shift
and custom sigmas are the pipeline's and its scheduler's. Every step goes to the timestep visited
next.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np

from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.conditioning import Conditioning, conditioning_of
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.vp_sde import (
    VPSDEDPMSolverScheduler,
    VPSDEEulerMaruyamaScheduler,
    VPSDEScheduler,
)
from accelkit.sample.discrete import DDIMScheduler, DDPMScheduler

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
2021), Euler on the flow-matching ODE (Liu et al. 2022).

On the continuous VP SDE ``dpm-fast`` is the DPM-Solver that the U-ViT paper samples with; ``ddpm``,
``ddim`` and ``dpm`` run on the betas that have its noise at whole timesteps."""

AUTO = "auto"
STOCHASTIC = ("ddpm", "em")
"""Samplers that keep adding noise, and take generators for it."""

_CONTINUOUS: dict[str, type[VPSDEScheduler]] = {
    "dpm-fast": VPSDEDPMSolverScheduler,
    "em": VPSDEEulerMaruyamaScheduler,
}
_DISCRETE = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
_AUTO = ("ddim", "flow")

_PROCESS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"}
_FIXED = {"fixed_small", "fixed_small_log", "fixed_large"}


def sampler_for(pipe: Any, name: str, steps: int) -> Any:
    """Return a sampler set to the timesteps that ``pipe`` itself visits with it.

    Args:
        pipe: a pipeline; it is left as it is.
        name: a key of :data:`SAMPLERS`, or ``auto`` (:func:`resolved`).
        steps: network calls per image without guidance.

    Raises:
        AccelkitError: unknown sampler, one that does not follow the process, or a number of steps
            that the process does not have.
    """
    scheduler = pipe.scheduler
    name = _checked(name, scheduler, steps)
    config = scheduler.config
    flow = name == "flow" or config.get("use_flow_sigmas")
    calls = _calls(pipe) if flow or name == "ddpm" else None
    # a scheduler that fixes the variance has no use for a learned one
    learned = (
        calls is not None and calls.learns_variance and config.get("variance_type") not in _FIXED
    )
    # pipelines of other processes give their scheduler a number of steps and nothing else
    spacing = calls.spacing(pipe, steps) if calls is not None and flow else {}
    if not config.get("use_dynamic_shifting"):
        spacing.pop("mu", None)  # which FLUX's pipeline gives all the same, to no effect
    elif flow and calls is not None and "mu" not in spacing:
        raise AccelkitError(
            f"the scheduler of this {type(pipe).__name__} shifts its timesteps by the resolution "
            "(use_dynamic_shifting), and the pipeline does not say by how much; give it a "
            "scheduler with use_dynamic_shifting=False"
        )
    return _made(name, scheduler, steps, learned, spacing)


def make_sampler(name: str, scheduler: Any, steps: int, learned_variance: bool = False) -> Any:
    """Return a sampler of the process of ``scheduler``, where there is no pipeline.

    A shift that follows the resolution is left out, which :func:`sampler_for` has.

    Args:
        name: a key of :data:`SAMPLERS`, or ``auto`` (:func:`resolved`).
        scheduler: a pipeline's scheduler; it is left as it is.
        steps: network calls per image without guidance.
        learned_variance: the network predicts a variance, which ancestral sampling then uses.

    Raises:
        AccelkitError: as :func:`sampler_for`.
    """
    return _made(_checked(name, scheduler, steps), scheduler, steps, learned_variance, {})


def resolved(name: str, scheduler: Any) -> str:
    """Return a sampler's name; for ``auto`` that of the deterministic one of the model's process.

    Raises:
        AccelkitError: it is unknown, or no sampler follows the process.
    """
    if name in SAMPLERS:
        return name
    if name != AUTO:
        raise AccelkitError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    if found := next((name for name in _AUTO if _follows(name, scheduler)), None):
        return found
    raise AccelkitError(
        f"no sampler follows the process of {_process(scheduler)}; sample with the pipeline itself"
    )


def _checked(name: str, scheduler: Any, steps: int) -> str:
    """Return the sampler's name.

    Raises:
        AccelkitError: there is no such sampler, it does not follow the process of ``scheduler``, or
            the process has no such number of steps.
    """
    name = resolved(name, scheduler)
    if not _follows(name, scheduler):
        others = (other for other in (*_AUTO, *SAMPLERS) if _follows(other, scheduler))
        advice = next((f"{other} does, or " for other in others), "")
        raise AccelkitError(
            f"the sampler {name} does not follow the process of {_process(scheduler)}; "
            f"{advice}sample with the pipeline itself"
        )
    sampler = _built(name, scheduler, _options(name, scheduler))
    # the last interval of DPM-Solver would have no width
    longest = scheduler.config.get("num_train_timesteps", 1000) - name.startswith("dpm")
    if not 1 <= steps <= longest or not _suits(_set(sampler, steps, {})):
        below = range(min(steps - 1, longest) if steps > 0 else longest, 0, -1)
        most = next((count for count in below if _suits(_set(sampler, count, {}))), 1)
        raise AccelkitError(f"{steps} sampling steps asked for; give 1 to {most}")
    return name


def _made(name: str, scheduler: Any, steps: int, learned: bool, spacing: dict[str, Any]) -> Any:
    sampler = _built(name, scheduler, _options(name, scheduler, learned, "mu" in spacing))
    _set(sampler, steps, spacing)
    if not sampler.timesteps.isfinite().all():
        raise AccelkitError(
            f"the timesteps of {type(scheduler).__name__} are stretched to end at its "
            f"shift_terminal, which one step has no room for; give at least 2 steps, got {steps}"
        )
    if name in _DISCRETE and sampler.config.prediction_type == "epsilon":
        first = int(sampler.timesteps[0])
        if not sampler.alphas_cumprod[first]:
            raise AccelkitError(
                f"the sampler {name} begins at timestep {first}, which is nothing but noise "
                "(rescale_betas_zero_snr), and a network that predicts noise says nothing of the "
                "data there; use dpm, or sample with the pipeline itself"
            )
    return sampler


def _calls(pipe: Any) -> Conditioning | None:
    """Return how the network of ``pipe`` is called, None for a mere holder of a scheduler."""
    if not (hasattr(pipe, "transformer") or hasattr(pipe, "unet")):
        return None
    return conditioning_of(backbone_of(denoiser_of(pipe)))


def _process(scheduler: Any) -> str:
    return f"{type(scheduler).__name__} ({NoiseAxis.of(scheduler).kind})"


def _follows(name: str, scheduler: Any) -> bool:
    """Whether the sampler's timesteps mean the noise that the scheduler's do."""
    sampler = _built(name, scheduler, _options(name, scheduler))
    whole = range(scheduler.config.get("num_train_timesteps", 1000))
    ours, theirs = (NoiseAxis.of(each).levels(whole) for each in (sampler, scheduler))
    return np.allclose(ours, theirs, atol=1e-4)


def _built(name: str, scheduler: Any, options: dict[str, Any]) -> Any:
    """Build a sampler as close to ``scheduler`` as it can be described to it.

    Defaults are each sampler's own unless they are of the process.
    """
    config, vp_sde = scheduler.config, isinstance(scheduler, VPSDEScheduler)
    defaults = set(config.get("_use_default_values", ())) - _PROCESS
    described = {key: value for key, value in config.items() if key not in defaults} | options
    kind: Any = _CONTINUOUS.get(name) if vp_sde or name == "em" else None
    kind = kind or _DISCRETE.get(name) or getattr(diffusers, SAMPLERS[name])
    if vp_sde and kind not in _CONTINUOUS.values():
        described["trained_betas"] = scheduler.discrete_betas()
        described["timestep_spacing"] = "trailing"  # from pure noise on
    takes = inspect.signature(kind).parameters
    described = {key: value for key, value in described.items() if key in takes}
    try:
        sampler = kind(**described)
    except NotImplementedError:  # betas that another class has no name for
        sampler = kind(**described | {"trained_betas": scheduler.betas.tolist()})
    if name == "flow" and hasattr(scheduler, "shift"):
        sampler.set_shift(scheduler.shift)  # which may have been set since
    return sampler


def _options(
    name: str, scheduler: Any, learned: bool = False, dynamic: bool = False
) -> dict[str, Any]:
    options: dict[str, Any] = {"variance_type": None, "use_dynamic_shifting": dynamic}
    if name == "ddpm":
        fixed = scheduler.config.get("variance_type")
        fixed = fixed if fixed in _FIXED else "fixed_small"
        options["variance_type"] = "learned_range" if learned else fixed
    if "flow_shift" in scheduler.config:  # as solvers call it that can do flow matching too
        options["shift"] = scheduler.config["flow_shift"]
    if name.startswith("dpm"):
        options["algorithm_type"] = "dpmsolver++"
    # a default that clips is not meant for latents
    options["clip_sample"] = scheduler.config.get("clip_sample", False)
    if name == "dpm-fast":
        options |= {"solver_order": 3, "lower_order_final": True}
    return options


def _set(sampler: Any, steps: int, spacing: dict[str, Any]) -> Any:
    """Set the timesteps as a pipeline does that gives ``spacing``, and return the sampler."""
    takes = inspect.signature(sampler.set_timesteps).parameters
    given = {key: value for key, value in spacing.items() if key in takes}
    sampler.set_timesteps(**{"num_inference_steps": steps} | given)
    if len(sampler.timesteps) > steps:
        # the spacing "trailing" of 61 steps, say, is rounded to 62, the last of them -1
        sampler.set_timesteps(timesteps=sampler.timesteps[:steps].tolist())
    return sampler


def _suits(sampler: Any) -> bool:
    """Whether all timesteps are of the process, and differ in their noise."""
    if not hasattr(sampler, "alphas_cumprod"):  # in continuous time
        return True
    # where a run ends may be what it visits last
    places = sampler.sigmas[:-1] if hasattr(sampler, "sigmas") else sampler.timesteps
    in_process = sampler.timesteps.max() < len(sampler.alphas_cumprod)
    return bool(in_process and places.diff().all())
