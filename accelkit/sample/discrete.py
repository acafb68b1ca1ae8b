"""DDIM and ancestral sampling on whichever timesteps are visited.

diffusers' DDIM steps back by T // steps, whatever its timesteps are, which is right for the spacing
"leading" alone: with "linspace" or "trailing" a sample has other noise than its timestep says. Its
ancestral sampling adds noise of a learned variance after the last timestep unless that is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor


class DDIMScheduler(diffusers.DDIMScheduler):
    """DDIM from each visited timestep to the next (Song et al. 2021, eq. 12).

    Takes the arguments of diffusers' own, whose results it has wherever that steps to the next
    visited timestep too. The step after the last timestep ends without noise, or at the noise of
    timestep 0 with ``set_alpha_to_one=False``.
    """

    num_inference_steps: Any

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set the timesteps of a run: a number of them, or ``timesteps``, which fall."""
        super().set_timesteps(num_inference_steps or len(timesteps or ()), device)
        if timesteps is not None:
            self.timesteps = torch.tensor(timesteps, device=device)

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, **options: Any
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """Take the step to the next visited timestep; arguments as of diffusers' own."""
        here = int(timestep)
        below = self.timesteps[self.timesteps < here]
        stride = here - (int(below[0]) if len(below) else -1)
        count = self.num_inference_steps
        # the base steps back by T // count, which is the stride of exactly this many
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, stride)
        try:
            return super().step(model_output, timestep, sample, **options)
        finally:
            self.num_inference_steps = count


class DDPMScheduler(diffusers.DDPMScheduler):
    """Ancestral sampling whose last step adds no noise (Ho et al. 2020, algorithm 2).

    Takes the arguments of diffusers' own.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the step to the next visited timestep; arguments as of diffusers' own."""
        made = super().step(model_output, timestep, sample, generator)
        if self.previous_timestep(timestep) < 0:
            made.prev_sample = made.pred_original_sample
        return made if return_dict else (made.prev_sample, made.pred_original_sample)
