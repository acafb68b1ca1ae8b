"""DDIM and ancestral sampling on any sequence of timesteps.

diffusers' DDIM always steps back by T // steps, which is right for the spacing "leading" only: with
"linspace" or "trailing" a sample's noise does not match its timestep. diffusers' ancestral sampling
with a learned variance adds noise after the last timestep unless that timestep is 0.
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

    Arguments are those of diffusers' class, and so are the results wherever diffusers also steps to
    the next visited timestep. The last step ends without noise, or at the noise of timestep 0 with
    ``set_alpha_to_one=False``.
    """

    num_inference_steps: Any

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Set the timesteps of a run: their number, or ``timesteps`` in decreasing order."""
        super().set_timesteps(num_inference_steps or len(timesteps or ()), device)
        if timesteps is not None:
            self.timesteps = torch.tensor(timesteps, device=device)

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, **options: Any
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """Take the step to the next visited timestep; arguments as in diffusers."""
        here = int(timestep)
        below = self.timesteps[self.timesteps < here]
        stride = here - (int(below[0]) if len(below) else -1)
        count = self.num_inference_steps
        # The base class steps back by T // count, which is the stride for exactly this count.
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, stride)
        try:
            return super().step(model_output, timestep, sample, **options)
        finally:
            self.num_inference_steps = count


class DDPMScheduler(diffusers.DDPMScheduler):
    """Ancestral sampling whose last step adds no noise (Ho et al. 2020, algorithm 2).

    Arguments are those of diffusers' class.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take the step to the next visited timestep; arguments as in diffusers."""
        made = super().step(model_output, timestep, sample, generator)
        if self.previous_timestep(timestep) < 0:
            made.prev_sample = made.pred_original_sample
        return made if return_dict else (made.prev_sample, made.pred_original_sample)
