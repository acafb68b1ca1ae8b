"""The samplers accelkit offers by name: diffusers' schedulers and two of the continuous VP SDE.

A sampler visits the timesteps that the pipeline's own call visits with it: spacing, offset, shift
and custom sigmas are the pipeline's and its scheduler's. Every step goes to the timestep visited
next.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import numpy as np

from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.vp_sde import (
    VPSDEDPMSolverScheduler,
    VPSDEEulerMaruyamaScheduler,
    VPSDEScheduler,
)
from accelkit.sample.discrete import DDIMScheduler, DDPMScheduler
from accelkit.subject import Subject

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
"""The deterministic sampler of the model's process."""
STOCHASTIC = ("ddpm", "em")
"""Samplers that add noise at every step and take generators for it."""

_CONTINUOUS: dict[str, type[VPSDEScheduler]] = {
    "dpm-fast": VPSDEDPMSolverScheduler,
    "em": VPSDEEulerMaruyamaScheduler,
}
_DISCRETE = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
_AUTO = ("ddim", "flow")

_PROCESS = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"}
_FIXED = {"fixed_small", "fixed_small_log", "fixed_large"}


def sampler_for(pipe: Any, name: str, steps: int) -> Any:
    """Return a sampler set to the timesteps that ``pipe`` itself visits with it, ready for one run.

    Args:
        pipe: a pipeline, which is not changed, or its subject, which keeps what is built. Of an
            object without a network only the scheduler is read.
        name: a key of :data:`SAMPLERS`, or ``auto``.
        steps: network calls per image without guidance.

    Raises:
        AccelkitError: the sampler is unknown or does not follow the process, or the process does
            not have this number of steps.
    """
    if not (isinstance(pipe, Subject) or hasattr(pipe, "transformer") or hasattr(pipe, "unet")):
        return make_sampler(name, pipe.scheduler, steps)  # a mere holder of a scheduler
    subject = Subject.of(pipe)
    made = subject.once(("sampler", name, steps), lambda: _sampler_for(subject, name, steps))
    return copy.deepcopy(made)  # a run leaves its state on a sampler


def visited_levels(subject: Subject, name: str, steps: int) -> list[float]:
    """Return the noise levels that a sampler visits; arguments and errors as of ``sampler_for``."""
    timesteps = sampler_for(subject, name, steps).timesteps
    samplers = samplers_of(subject)
    return samplers.axis_of(samplers.named(name)).levels(timesteps)


def make_sampler(name: str, scheduler: Any, steps: int, learned_variance: bool = False) -> Any:
    """Return a sampler of the process of ``scheduler``, where there is no pipeline.

    Shifting by resolution, which only a pipeline knows, is left out. With ``learned_variance`` the
    network predicts a variance, which ``ddpm`` uses. The rest is as for :func:`sampler_for`.
    """
    samplers = Samplers(scheduler, NoiseAxis.of(scheduler))
    return samplers.made(samplers.checked(name, steps), steps, learned_variance, {})


def samplers_of(subject: Subject) -> Samplers:
    """Return the samplers that follow the process of a subject's scheduler."""
    return subject.once("samplers", lambda: Samplers(subject.scheduler, subject.axis))


def _sampler_for(subject: Subject, name: str, steps: int) -> Any:
    scheduler, samplers = subject.scheduler, samplers_of(subject)
    name = samplers.checked(name, steps)
    config = scheduler.config
    flow = name == "flow" or config.get("use_flow_sigmas")
    learned, spacing = False, {}
    if name == "ddpm":  # a scheduler that fixes the variance has no use for a learned one
        fixed = config.get("variance_type") in _FIXED
        learned = subject.calls.learns_variance and not fixed
    if flow:  # pipelines of other processes give their scheduler a number of steps and nothing else
        spacing = subject.calls.spacing(subject.pipe, steps)
    if not config.get("use_dynamic_shifting"):
        spacing.pop("mu", None)  # FLUX's pipeline gives it all the same, to no effect
    elif flow and "mu" not in spacing:
        raise AccelkitError(
            f"the scheduler of this {type(subject.pipe).__name__} shifts its timesteps by the "
            "resolution (use_dynamic_shifting), and the pipeline does not say by how much; give it "
            "a scheduler with use_dynamic_shifting=False"
        )
    return samplers.made(name, steps, learned, spacing)


class Samplers:
    """The samplers that follow the process of one scheduler, given with its noise axis."""

    def __init__(self, scheduler: Any, axis: NoiseAxis) -> None:
        self._scheduler, self._axis = scheduler, axis
        self._built: dict[str, tuple[Any, NoiseAxis, bool]] = {}

    def axis_of(self, name: str) -> NoiseAxis:
        """Return the noise axis of a sampler."""
        return self._plain(name)[1]

    def named(self, name: str) -> str:
        """Return the name of a sampler, which for ``auto`` is one that follows the process.

        Raises:
            AccelkitError: the name is unknown, or no sampler follows the process.
        """
        if name in SAMPLERS:
            return name
        if name != AUTO:
            raise AccelkitError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
        if found := next((name for name in _AUTO if self._follows(name)), None):
            return found
        raise AccelkitError(
            f"no sampler follows the process of {self._process()}; sample with the pipeline itself"
        )

    def checked(self, name: str, steps: int) -> str:
        """Return the name of a sampler; raises as :func:`sampler_for` if it is not allowed."""
        name = self.named(name)
        if not self._follows(name):
            others = (other for other in (*_AUTO, *SAMPLERS) if self._follows(other))
            advice = next((f"{other} does, or " for other in others), "")
            raise AccelkitError(
                f"the sampler {name} does not follow the process of {self._process()}; "
                f"{advice}sample with the pipeline itself"
            )
        sampler = self._plain(name)[0]
        # the last interval of DPM-Solver would have no width
        longest = self._scheduler.config.get("num_train_timesteps", 1000) - name.startswith("dpm")
        if not 1 <= steps <= longest or not _suits(_set(sampler, steps, {})):
            below = range(min(steps - 1, longest) if steps > 0 else longest, 0, -1)
            most = next((count for count in below if _suits(_set(sampler, count, {}))), 1)
            raise AccelkitError(f"{steps} sampling steps asked for; give 1 to {most}")
        return name

    def made(self, name: str, steps: int, learned: bool, spacing: dict[str, Any]) -> Any:
        """Return a sampler of its own, set to a number of steps."""
        scheduler = self._scheduler
        sampler = _built(name, scheduler, _options(name, scheduler, learned, "mu" in spacing))
        _set(sampler, steps, spacing)
        if not sampler.timesteps.isfinite().all():
            raise AccelkitError(
                f"the timesteps of {type(scheduler).__name__} are stretched to end at its "
                f"shift_terminal, which one step has no room for; give at least 2 steps, got "
                f"{steps}"
            )
        if name in _DISCRETE and sampler.config.prediction_type == "epsilon":
            first = int(sampler.timesteps[0])
            if not sampler.alphas_cumprod[first]:
                raise AccelkitError(
                    f"the sampler {name} begins at timestep {first}, which is nothing but noise "
                    "(rescale_betas_zero_snr), and a network that predicts noise says nothing of "
                    "the data there; use dpm, or sample with the pipeline itself"
                )
        return sampler

    def _plain(self, name: str) -> tuple[Any, NoiseAxis, bool]:
        """Return a sampler as it is without a pipeline, its axis, and whether it follows."""
        if name not in self._built:
            sampler = _built(name, self._scheduler, _options(name, self._scheduler))
            axis = NoiseAxis.of(sampler)
            whole = range(self._scheduler.config.get("num_train_timesteps", 1000))
            follows = np.allclose(axis.levels(whole), self._axis.levels(whole), atol=1e-4)
            self._built[name] = sampler, axis, follows
        return self._built[name]

    def _follows(self, name: str) -> bool:
        """Whether the sampler's timesteps stand for the same noise as the scheduler's."""
        return self._plain(name)[2]

    def _process(self) -> str:
        return f"{type(self._scheduler).__name__} ({self._axis.kind})"


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
        sampler.set_shift(scheduler.shift)  # set_shift does not write it to the config
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
