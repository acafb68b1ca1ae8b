"""Images to what a denoiser is given of them and back: an autoencoder's latents, and their scale.

An autoencoder of videos (Wan's) takes an image for a video of one frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AT_USE = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std"})
"""Settings of an autoencoder that apply to its latents when they are used, not when made."""


def scaling(vae: Any | None) -> tuple[Any, Any]:
    """Return shift and scale: a denoiser is given (what the autoencoder made - shift) * scale.

    Numbers, or (C, 1, 1) where the autoencoder tells mean and deviation of every channel.
    """
    config = {} if vae is None else vae.config
    if "scaling_factor" not in config and config.get("latents_std"):
        mean, std = (
            torch.tensor(config[f"latents_{name}"])[:, None, None] for name in ("mean", "std")
        )
        return mean, 1 / std
    return config.get("shift_factor") or 0.0, config.get("scaling_factor", 1.0)


def of_videos(vae: Any) -> bool:
    """Whether the autoencoder takes (B, C, F, H, W)."""
    return "temperal_downsample" in vae.config


def posterior(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Return ``mean`` and ``std`` (B, C, h, w) of images in [-1, 1], (B, 3, H, W), unscaled.

    float32 on the CPU; without ``std`` for a deterministic autoencoder.
    """
    frames = pixels.unsqueeze(2) if of_videos(vae) else pixels
    encoded = vae.encode(frames.to(vae.dtype))
    if not hasattr(encoded, "latent_dist"):  # AutoencoderDC
        return {"mean": encoded.latent.float().cpu()}
    made = {"mean": encoded.latent_dist.mean, "std": encoded.latent_dist.std}
    flat = {k: v.squeeze(2) if of_videos(vae) else v for k, v in made.items()}
    return {name: value.float().cpu() for name, value in flat.items()}


def decoded(vae: Any | None, latents: Tensor) -> Tensor:
    """Return the images of scaled latents (B, C, h, w), without an autoencoder they themselves."""
    if vae is None:
        return latents
    shift, scale = (v.to(latents) if isinstance(v, Tensor) else v for v in scaling(vae))
    raw = 1 / scale * latents + shift
    if of_videos(vae):
        return vae.decode(raw.unsqueeze(2)).sample.squeeze(2)
    return vae.decode(raw).sample
