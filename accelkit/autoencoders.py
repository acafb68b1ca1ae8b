"""Pictures to the latents that a denoiser is given, and back, as diffusers' pipelines do it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.autoencoder import AT_USE, kind_of, scaling
from accelkit.errors import AccelkitError

__all__ = ["AT_USE", "decoded", "posterior", "scaling"]


@torch.no_grad()
def posterior(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Return ``mean`` and ``std`` (B, C, h, w) of pictures in [-1, 1], (B, 3, H, W), unscaled.

    float32 on the CPU; without ``std`` for a deterministic autoencoder.

    Raises:
        AccelkitError: an autoencoder that accelkit does not know how to call, or latents that are
            not finite.
    """
    kind = kind_of(vae)
    frames = pixels.unsqueeze(2) if kind.frames else pixels
    with _upcast(vae):
        encoded = vae.encode(frames.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        made = {"mean": encoded.latent_dist.mean, "std": encoded.latent_dist.std}
    else:  # deterministic: AutoencoderDC's "latent", AutoencoderTiny's and VQModel's "latents"
        named = "latent" if hasattr(encoded, "latent") else "latents"
        made = {"mean": getattr(encoded, named)}
    _refuse_infinite(f"this {type(vae).__name__}", "latents", *made.values())
    return {k: (v.squeeze(2) if kind.frames else v).float().cpu() for k, v in made.items()}


def decoded(
    vae: Any | None, latents: Tensor, applied: Collection[str] = AT_USE, upcast: bool = False
) -> Tensor:
    """Return the pictures (B, 3, H, W) of scaled latents (B, C, h, w), nominally in [-1, 1].

    Args:
        vae: the autoencoder; None for pixels, which are returned as they are.
        latents: what a sampler ends with.
        applied: the settings that the pipeline applies to latents, as for :func:`scaling`.
        upcast: decode in float32 where a half-precision autoencoder asks for it
            (``force_upcast``), as some pipelines do.

    Raises:
        AccelkitError: as :func:`scaling`, an autoencoder that accelkit does not know how to call,
            or pictures that are not finite.
    """
    if vae is None:
        _refuse_infinite("the network", "pictures", latents)
        return latents
    kind = kind_of(vae)
    shift, scale = (
        v.to(latents.device) if isinstance(v, Tensor) else v for v in scaling(vae, applied)
    )
    wide = torch.promote_types(latents.dtype, torch.float32)
    raw = 1 / scale * latents.to(wide) + shift
    with _upcast(vae, upcast):
        given = (raw.unsqueeze(2) if kind.frames else raw).to(vae.dtype)
        made = vae.decode(given).sample
    _refuse_infinite(f"this {type(vae).__name__}", "pictures", made)
    return made.squeeze(2) if kind.frames else made


@contextmanager
def _upcast(vae: Any, wanted: bool = True) -> Iterator[None]:
    """Run an autoencoder that overflows in float16 in float32, as long as it is entered."""
    if not (wanted and vae.dtype == torch.float16 and vae.config.get("force_upcast")):
        yield
        return
    nn.Module.to(vae, torch.float32)  # diffusers' own .to warns of half precision on the way back
    try:
        yield
    finally:
        nn.Module.to(vae, torch.float16)


def _refuse_infinite(maker: str, what: str, *values: Tensor) -> None:
    if not all(value.isfinite().all() for value in values):
        dtype = str(values[0].dtype).removeprefix("torch.")
        raise AccelkitError(
            f"{maker} made {what} that are not finite, in {dtype}; use it in float32 or bfloat16, "
            "or check its weights and what it was given"
        )
