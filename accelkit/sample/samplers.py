"""The samplers accelkit offers by name, all of them diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import diffusers

from accelkit.errors import AccelkitError

SAMPLERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
}
"""Ancestral sampling (Ho et al. 2020), DDIM (Song et al. 2021), DPM-Solver++ (Lu et al. 2022)."""


def make_sampler(name: str, scheduler: Any, steps: int, learned_variance: bool = False) -> Any:
    """Return a sampler for the process that ``scheduler`` describes, set to ``steps`` steps.

    Args:
        name: a key of :data:`SAMPLERS`.
        scheduler: a pipeline's scheduler; it is left as it is.
        steps: network calls per image without guidance.
        learned_variance: the network predicts a variance, which ancestral sampling then uses.

    Raises:
        AccelkitError: unknown sampler, or a number of steps the process does not have.
    """
    if name not in SAMPLERS:
        raise AccelkitError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    # DPM-Solver's last interval would have no width
    longest = scheduler.config.num_train_timesteps - (name == "dpm")
    if not 1 <= steps <= longest:
        raise AccelkitError(f"{steps} sampling steps asked for; give 1 to {longest}")
    options: dict[str, Any] = {"variance_type": None}
    if name == "ddpm":
        options["variance_type"] = "learned_range" if learned_variance else "fixed_small"
    if name == "dpm":
        options |= {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
    else:  # their default clips, which latents do not bear
        options["clip_sample"] = scheduler.config.get("clip_sample", False)
    sampler = getattr(diffusers, SAMPLERS[name]).from_config(scheduler.config, **options)
    sampler.set_timesteps(steps)
    return sampler
