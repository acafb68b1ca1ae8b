"""Images from a class-conditional pipeline, each from its own seed.

An image depends on its label and seed alone, not on the batch it was made in: noise is drawn on
the CPU by one generator per image, for samplers that keep adding noise as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError
from accelkit.sample.samplers import make_sampler


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Attributes:
        sampler: ``ddpm``, ``ddim`` or ``dpm`` (DPM-Solver++).
        steps: network calls per image.
        guidance: classifier-free guidance scale; 1 is none and runs no second half of the batch.
        guidance_channels: how many latent channels are guided, None for all as diffusers does;
            the original DiT guides the first 3.
    """

    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.0
    guidance_channels: int | None = None


def guide(cond: Tensor, uncond: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Return uncond + scale (cond - uncond) on the first ``channels``, cond on the rest.

    Classifier-free guidance (Ho and Salimans 2022, eq. 6) for predictions of shape (B, C, H, W).
    """
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, guided.shape[1] :]], dim=1)


@torch.no_grad()
def generate_latents(
    pipe: Any, labels: Sequence[int], seeds: Sequence[int], how: Sampling
) -> Tensor:
    """Return latents of shape (B, C, H, W), before the autoencoder's scaling is undone.

    Args:
        pipe: a pipeline with ``transformer`` and ``scheduler``, with or without a schedule.
        labels: a class per image.
        seeds: a seed per image.
        how: sampler, steps and guidance.

    Raises:
        AccelkitError: labels the model lacks, or as many seeds as labels are not given.
    """
    model = pipe.transformer
    null, channels, size = (
        backbone_of(model).null_class,
        model.config.in_channels,
        model.config.sample_size,
    )
    if len(labels) != len(seeds):
        raise AccelkitError(f"got {len(labels)} labels for {len(seeds)} seeds; give one of each")
    outside = [label for label in labels if not 0 <= label <= null]
    if outside:
        raise AccelkitError(f"the model has classes 0 to {null - 1}, got {outside[0]}")
    learned = _learns_variance(model)
    sampler = make_sampler(how.sampler, pipe.scheduler, how.steps, learned)
    uses_variance = how.sampler == "ddpm" and learned
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    device, dtype = model.device, model.dtype
    shape = (len(labels), channels, size, size)
    x = randn_tensor(shape, generators, torch.device("cpu")).to(device, dtype)
    x = x * sampler.init_noise_sigma
    y = torch.tensor(labels, device=device)
    guided = how.guidance != 1
    if guided:
        y = torch.cat([y, torch.full_like(y, null)])
    for t in sampler.timesteps:
        scaled = sampler.scale_model_input(x, t)
        inputs = torch.cat([scaled, scaled]) if guided else scaled
        output = model(inputs, timestep=t.expand(len(inputs)).to(device), class_labels=y).sample
        eps, variance = output[:, :channels], output[:, channels:]
        if guided:
            cond, uncond = eps.chunk(2)
            eps = guide(cond, uncond, how.guidance, how.guidance_channels)
            variance = variance.chunk(2)[0]
        predicted = torch.cat([eps, variance], dim=1) if uses_variance else eps
        noise = {"generator": generators} if how.sampler == "ddpm" else {}
        x = sampler.step(predicted, t, x, **noise).prev_sample
    return x


@torch.no_grad()
def generate(
    pipe: Any, labels: Sequence[int], seeds: Sequence[int], how: Sampling | None = None
) -> np.ndarray:
    """Return images, uint8 of shape (B, height, width, 3), from a class and a seed each.

    Arguments and errors as :func:`generate_latents`; rounding to bytes as diffusers does.
    """
    latents = generate_latents(pipe, labels, seeds, how or Sampling())
    config = pipe.vae.config
    shift = getattr(config, "shift_factor", None) or 0.0
    pixels = pipe.vae.decode(1 / config.scaling_factor * latents + shift).sample
    pixels = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu()
    return (pixels * 255).round().to(torch.uint8).numpy()


def _learns_variance(model: Any) -> bool:
    return model.out_channels == 2 * model.config.in_channels


def grid(images: np.ndarray, columns: int = 0) -> np.ndarray:
    """Return ``images`` (B, H, W, 3) as one picture with a dark line of two pixels between them."""
    count, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    canvas = np.full((rows * (height + 2) + 2, columns * (width + 2) + 2, 3), 32, np.uint8)
    for i, image in enumerate(images):
        top, left = divmod(i, columns)
        top, left = 2 + top * (height + 2), 2 + left * (width + 2)
        canvas[top : top + height, left : left + width] = image
    return canvas
