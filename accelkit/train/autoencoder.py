"""A small AutoencoderKL for small images: the first stage of a latent diffusion model."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor

from accelkit.errors import AccelkitError
from accelkit.models.sizes import MOST, MOST_LAYERS


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture and training settings of the autoencoder.

    ``kl_weight`` multiplies the KL term per latent element; it is small because the latents are
    normalised by their measured deviation afterwards (Rombach et al. 2022, section G).

    Raises:
        AccelkitError: a setting of the wrong kind or out of range.
    """

    channels: tuple[int, ...] = (16, 32, 32)
    layers_per_block: int = 1
    latent_channels: int = 4
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "steps", "batch_size"):
            self._require(name, _is_whole(getattr(self, name), 1), "a whole number, at least 1")
        few = _is_whole(self.layers_per_block, 1, MOST_LAYERS)
        self._require("layers_per_block", few, f"a whole number, 1 to {MOST_LAYERS - 1}")
        self._require("seed", _is_whole(self.seed, 0, 2**32), "a whole number in [0, 2^32)")
        for name, least in (("learning_rate", "above 0"), ("kl_weight", "0 or more")):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            holds = number and 0 <= value < math.inf and (value > 0 or name == "kl_weight")
            self._require(name, holds, f"a finite number {least}")
        levels = self.channels if isinstance(self.channels, tuple) else ()
        divisible = all(_is_whole(c, 1) and c % _GROUPS == 0 for c in levels)
        self._require(
            "channels",
            0 < len(levels) <= _LEVELS and divisible,
            f"a list of multiples of {_GROUPS}, at most {_LEVELS} of them",
        )

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise AccelkitError(
                f"{name} is {wanted}, not {getattr(self, name)!r}; see [autoencoder]"
            )


def _is_whole(value: Any, least: int, below: int = MOST + 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < below


_LEVELS = 16
_GROUPS = 8
"""Groups of the normalisations, which divide the channels evenly."""


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
        norm_num_groups=_GROUPS,
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
