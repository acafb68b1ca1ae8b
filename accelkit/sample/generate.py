"""Images from a pipeline, each from a seed and from a class or caption if the model takes any.

An image depends on these alone and not on its batch: one generator per image draws noise on the
CPU, also for samplers that add noise at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from accelkit.backbones.autoencoders import autoencoder_of, check_autoencoder, decoded
from accelkit.backbones.conditioning import Item
from accelkit.errors import AccelkitError
from accelkit.runtime import conflicts
from accelkit.sample.samplers import STOCHASTIC, sampler_for
from accelkit.sample.sampling import Sampling
from accelkit.subject import Subject


def check_seed(seed: int) -> None:
    """Raise AccelkitError for a seed outside [0, 2^32)."""
    if not 0 <= seed < 2**32:
        raise AccelkitError(f"a seed is in [0, 2^32), got {seed}")


def guide(cond: Tensor, uncond: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Return uncond + scale (cond - uncond) on the first ``channels``, cond on the rest.

    Classifier-free guidance (Ho and Salimans 2022, eq. 6) for predictions of shape (B, C, H, W).
    """
    guided = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([guided, cond[:, guided.shape[1] :]], dim=1)


@torch.no_grad()
def generate_latents(
    pipe: Any, items: Sequence[Item], seeds: Sequence[int], how: Sampling
) -> Tensor:
    """Return latents of shape (B, C, H, W), before the autoencoder's scaling is undone.

    Args:
        pipe: a pipeline or its subject, with or without a schedule.
        items: a class per image, a caption if the model is prompted by text, or None.
        seeds: a seed per image.
        how: sampler, steps and guidance.

    Raises:
        AccelkitError: the model lacks a class, guidance is given for a model without classes or
            captions, or the numbers of seeds and items differ.
    """
    subject = Subject.of(pipe)
    model, calls = subject.model, subject.calls
    if len(items) != len(seeds):
        raise AccelkitError(f"got {len(items)} labels for {len(seeds)} seeds; give one of each")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sampler = sampler_for(subject, how.sampler, how.steps)
    if hasattr(sampler, "set_begin_index"):  # two timesteps may be rounded to the same number
        sampler.set_begin_index(0)
    uses_variance = sampler.config.get("variance_type") == "learned_range"
    draws_noise = how.sampler in STOCHASTIC or sampler.config.get("stochastic_sampling")
    noise = {"generator": generators} if draws_noise else {}
    device, dtype = model.device, model.dtype
    shape = (len(items), *calls.shape)
    x = randn_tensor(shape, generators, torch.device("cpu")).to(device, dtype)
    x = x * getattr(sampler, "init_noise_sigma", 1.0)  # flow matching has neither of the two
    scale_input = getattr(sampler, "scale_model_input", lambda x, t: x)
    rows = calls.encode(subject.pipe, items)
    guided = how.guidance != 1
    if guided:
        if not rows:
            raise AccelkitError(
                f"a {type(model).__name__} without classes or captions has nothing to guide by; "
                "use guidance 1"
            )
        nulls = calls.encode(subject.pipe, [None] * len(items))
        rows = {name: torch.cat([rows[name], nulls[name]]) for name in rows}
    with conflicts.sampling_run(model):
        for t in sampler.timesteps:
            scaled = scale_input(x, t)
            inputs = torch.cat([scaled, scaled]) if guided else scaled
            timestep = t.expand(len(inputs)).to(device)
            output = model(**calls.arguments(inputs, timestep, rows), return_dict=False)[0]
            output = calls.prediction(output, inputs)
            predicted, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
            if guided:
                cond, uncond = predicted.chunk(2)
                predicted = guide(cond, uncond, how.guidance, how.guidance_channels)
                variance = variance.chunk(2)[0]
            if uses_variance:
                predicted = torch.cat([predicted, variance], dim=1)
            x = sampler.step(predicted, t, x, **noise).prev_sample
    return x


@torch.no_grad()
def generate(
    pipe: Any, items: Sequence[Item], seeds: Sequence[int], how: Sampling | None = None
) -> np.ndarray:
    """Return images, uint8 of shape (B, height, width, 3), from an item and a seed each.

    Arguments and errors are those of :func:`generate_latents`; bytes are rounded as in diffusers.
    """
    subject = Subject.of(pipe)
    return decode(subject, generate_latents(subject, items, seeds, how or Sampling()))


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> np.ndarray:
    """Return the images that ``pipe`` makes of ``latents``, uint8 of shape (B, height, width, 3).

    Args:
        pipe: a pipeline or its subject; without an autoencoder the latents are the images
            themselves, in [-1, 1].
        latents: what :func:`generate_latents` returns, (B, C, h, w), or those of a video of one
            frame, (B, C, 1, h, w).

    Raises:
        AccelkitError: the autoencoder makes no images of the latents, or it is not known how the
            pipeline scales them.
    """
    if latents.ndim == 5 and latents.shape[2] == 1:
        latents = latents.squeeze(2)
    if latents.ndim != 4:
        raise AccelkitError(
            f"decode takes latents in maps, (B, C, h, w), got {tuple(latents.shape)}"
        )
    subject = Subject.of(pipe)
    pipe = subject.pipe
    check_autoencoder(pipe, latents.shape[1])
    calls = subject.learn().calls
    pixels = decoded(autoencoder_of(pipe), latents, calls.latent_settings, calls.upcasts(pipe))
    pixels = (pixels / 2 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1).cpu()
    return (pixels * 255).round().to(torch.uint8).numpy()


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
