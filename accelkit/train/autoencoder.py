"""A small AutoencoderKL for small images: the first stage of a latent diffusion model."""

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor

from accelkit.errors import AccelkitError
from accelkit.train.config import GROUPS, AutoencoderConfig


def build_autoencoder(config: AutoencoderConfig, size: int) -> AutoencoderKL:
    """Return a freshly initialised AutoencoderKL for RGB images of ``size`` pixels a side."""
    levels = len(config.channels)
    torch.manual_seed(config.seed)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=GROUPS,
        sample_size=size,
    )


def train_autoencoder(
    images: Tensor,
    config: AutoencoderConfig,
    on_step: Callable[[int, float], None] | None = None,
) -> AutoencoderKL:
    """Train on ``images`` and return the model in eval mode, with the scale of its latents set.

    The loss is the mean squared plus the mean absolute error of the reconstruction and the KL
    divergence of the posterior from N(0, I). Weights are rounded to half precision at the end, so
    that weights stored as float16 are exactly those that later stages are trained on.

    Args:
        images: uint8 of shape (n, 3, size, size), all in memory.
        config: architecture, length and seed.
        on_step: called with the step (1-based) and its loss.

    Raises:
        AccelkitError: the loss, its gradient or the deviation of the latents is not finite.
    """
    vae = build_autoencoder(config, images.shape[-1])
    vae = vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(images), (config.batch_size,), generator=generator)
        x = images[rows].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        recon = vae.decode(posterior.sample(generator)).sample
        error = recon - x
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error.square().mean() + error.abs().mean() + config.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for what, value in (("loss", loss), ("gradient norm", norm)):
            if not torch.isfinite(value):
                raise AccelkitError(
                    f"the autoencoder's {what} is {value.item()} at step {step}; lower its "
                    "learning rate"
                )
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, loss.item())
    vae = vae.half().float().eval().to(memory_format=torch.contiguous_format)
    deviation = _latent_deviation(vae, images)
    if not 0 < deviation < math.inf:
        raise AccelkitError(
            f"the trained autoencoder's latents have a deviation of {deviation}; lower its "
            "learning rate"
        )
    vae.register_to_config(scaling_factor=1 / deviation)
    return vae


@torch.no_grad()
def _latent_deviation(vae: AutoencoderKL, images: Tensor) -> float:
    """Return the deviation of sampled latents over ``images``: mean variance plus spread."""
    total = torch.zeros(3, dtype=torch.float64)
    for chunk in images.split(256):
        posterior = vae.encode(chunk.float() / 127.5 - 1).latent_dist
        mean, var = posterior.mean.double(), posterior.var.double()
        total += torch.stack([mean.sum(), (mean.square() + var).sum(), torch.tensor(mean.numel())])
    first, second, count = total.tolist()
    variance = second / count - (first / count) ** 2
    return variance**0.5 if variance > 0 else variance  # nan, or rounded below 0
