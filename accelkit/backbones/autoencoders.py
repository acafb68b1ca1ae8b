"""diffusers' autoencoders of pictures, used as diffusers' own pipelines use them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.errors import AccelkitError

Factor = Callable[[Any], int]


@dataclass(frozen=True)
class Kind:
    """How autoencoders of a class are called.

    Attributes:
        factor: returns the pixels per latent along a side for a config.
        channels: names of the settings for the channels of the latents; the first that is set
            counts.
        frames: whether it takes videos, (B, C, F, H, W), with a picture as a single frame.
    """

    factor: Factor
    channels: tuple[str, ...] = ("latent_channels",)
    frames: bool = False


def _halvings(levels: str) -> Factor:
    return lambda config: 2 ** (len(config[levels]) - 1)


def _setting(name: str) -> Factor:
    return lambda config: config[name]


KINDS = {
    "AsymmetricAutoencoderKL": Kind(_halvings("block_out_channels")),
    "AutoencoderDC": Kind(_halvings("encoder_block_out_channels")),
    "AutoencoderKL": Kind(_halvings("block_out_channels")),
    "AutoencoderKLHunyuanImage": Kind(_setting("spatial_compression_ratio")),
    "AutoencoderKLWan": Kind(_setting("scale_factor_spatial"), ("z_dim",), frames=True),
    "AutoencoderTiny": Kind(_halvings("block_out_channels")),
    "VQModel": Kind(_halvings("block_out_channels"), ("vq_embed_dim", "latent_channels")),
}
"""By the name of the class, so that no class has to be imported."""

_REASONS = {
    "AutoencoderKLFlux2": "its pipelines normalise the latents in patches of 2x2",
    "AutoencoderRAE": "it scales its latents itself and takes pixels in [0, 1], not [-1, 1]",
    "ConsistencyDecoderVAE": "its decoder draws noise, so a picture would not follow from its seed",
}

AT_USE = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std"})
"""Settings of an autoencoder that are applied when latents are used, not when they are made."""

_NAMES = ("vae", "vqvae")


def autoencoder_of(pipe: Any) -> Any | None:
    """Return the autoencoder of a pipeline, None for a pipeline in pixels."""
    held = (getattr(pipe, name, None) for name in _NAMES)
    return next((part for part in held if part is not None), None)


def kind_of(vae: Any) -> Kind:
    """Return how an autoencoder is called.

    Raises:
        AccelkitError: its class is neither one of :data:`KINDS` nor derived from one.
    """
    return kind_of_class(
        type(getattr(vae, "_orig_mod", vae))
    )  # the module that torch.compile wrapped


def kind_of_class(cls: type) -> Kind:
    """Return how autoencoders of a class are called; raises as :func:`kind_of` does."""
    names = [base.__name__ for base in cls.__mro__]
    if known := next((KINDS[name] for name in names if name in KINDS), None):
        return known
    why = next((f": {_REASONS[name]}" for name in names if name in _REASONS), "")
    raise AccelkitError(
        f"accelkit cannot map pictures by the autoencoder {cls.__name__}{why}; "
        f"give the pipeline one of {', '.join(KINDS)}"
    )


def factor_of(vae: Any) -> int:
    """Return the pixels per latent along a side.

    Raises:
        AccelkitError: as :func:`kind_of`.
    """
    return kind_of(vae).factor(vae.config)


def channels_of(vae: Any) -> int:
    """Return the channels of an autoencoder's latents.

    Raises:
        AccelkitError: as :func:`kind_of`.
    """
    names = kind_of(vae).channels
    return next(vae.config[name] for name in names if vae.config.get(name) is not None)


def scaling(vae: Any | None, applied: Collection[str] = AT_USE) -> tuple[Any, Any]:
    """Return shift and scale: a denoiser is given (encoded latents - shift) * scale.

    They are numbers, or float32 (C, 1, 1) if each channel has a mean and a deviation. If there is
    a scaling factor too, the scale is factor / deviation, as in Stable Diffusion XL's pipelines.

    Args:
        vae: the autoencoder; None for pixels.
        applied: the settings that the pipeline applies, in most families not all of ``AT_USE``.

    Raises:
        AccelkitError: the autoencoder has no setting that the pipeline could scale by.
    """
    if vae is None:
        return 0.0, 1.0
    given = {name: vae.config.get(name) for name in applied}
    factor, mean, std = (given.get(n) for n in ("scaling_factor", "latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (mean, std))
        return mean, (1.0 if factor is None else factor) / std
    if factor is None:
        needed = "scaling_factor" if "scaling_factor" in applied else "latents_mean and latents_std"
        raise AccelkitError(
            f"the pipeline scales latents by {needed}, which its {type(vae).__name__} does not "
            "have; set it with pipe.vae.register_to_config(...), or give another autoencoder"
        )
    return given.get("shift_factor") or 0.0, factor


def check_autoencoder(pipe: Any, channels: int) -> None:
    """Raise AccelkitError unless ``pipe`` can decode latents with so many channels."""
    vae = autoencoder_of(pipe)
    if vae is None:
        takes = set(inspect.signature(type(pipe).__init__).parameters) & set(_NAMES)
        needed = takes - set(getattr(pipe, "_optional_components", ()))
        if needed or channels not in _PIXELS:
            raise AccelkitError(
                f"the pipeline has no autoencoder and its network makes {channels} channels, which "
                "are no pictures; give it the autoencoder that the network was trained with: "
                "pipe.vae = ..."
            )
        return
    if (own := channels_of(vae)) != channels:
        raise AccelkitError(
            f"the pipeline's {type(vae).__name__} has {own} latent channels, its network "
            f"{channels}; give it the autoencoder that the network was trained with: pipe.vae = ..."
        )


_PIXELS = (1, 3, 4)  # grey, RGB and RGB with an alpha channel


@torch.no_grad()
def posterior(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Return ``mean`` and ``std`` (B, C, h, w) of pictures in [-1, 1], (B, 3, H, W), unscaled.

    They are float32 on the CPU. A deterministic autoencoder has no ``std``.

    Raises:
        AccelkitError: accelkit does not know how to call the autoencoder, or the latents are not
            finite.
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
        vae: the autoencoder; None for pixels, which are returned unchanged.
        latents: the sampler's result.
        applied: the settings that the pipeline applies to latents, as for :func:`scaling`.
        upcast: decode in float32 where a half-precision autoencoder asks for it
            (``force_upcast``), as some pipelines do.

    Raises:
        AccelkitError: as :func:`scaling`; accelkit does not know how to call the autoencoder; or
            the pictures are not finite.
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
    """Run an autoencoder that overflows in float16 in float32 while the context is entered."""
    if not (wanted and vae.dtype == torch.float16 and vae.config.get("force_upcast")):
        yield
        return
    nn.Module.to(vae, torch.float32)  # diffusers' .to warns when cast back
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
