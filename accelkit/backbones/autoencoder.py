"""The autoencoders of diffusers that map pictures, and the size and scale of their latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from accelkit.errors import AccelkitError

Factor = Callable[[Any], int]


@dataclass(frozen=True)
class Kind:
    """How autoencoders of a class are called.

    Attributes:
        factor: pixels per latent along a side, from the settings.
        channels: settings that hold the channels of the latents; the first that is set counts.
        frames: whether it maps videos, of which a picture is one frame: (B, C, F, H, W).
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
"""By name, so that none is imported until a pipeline holds one."""

_REASONS = {
    "AutoencoderKLFlux2": "its pipelines normalise the latents in patches of 2x2",
    "AutoencoderRAE": "it scales its latents itself and takes pixels in [0, 1], not [-1, 1]",
    "ConsistencyDecoderVAE": "its decoder draws noise, so a picture would not follow from its seed",
}

AT_USE = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std"})
"""Settings of an autoencoder that apply to its latents when they are used, not when made."""

_NAMES = ("vae", "vqvae")


def autoencoder_of(pipe: Any) -> Any | None:
    """Return the autoencoder of a pipeline, None for a pipeline in pixels."""
    held = (getattr(pipe, name, None) for name in _NAMES)
    return next((part for part in held if part is not None), None)


def kind_of(vae: Any) -> Kind:
    """Return how an autoencoder is called.

    Raises:
        AccelkitError: its class is not one of :data:`KINDS`, nor derived from one.
    """
    return kind_of_class(type(getattr(vae, "_orig_mod", vae)))  # what torch.compile wrapped


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
    """Return shift and scale: a denoiser is given (what the autoencoder made - shift) * scale.

    Numbers, or float32 (C, 1, 1) where each channel has a mean and a deviation. With both of these
    and a scaling factor, the scale is factor / deviation, as Stable Diffusion XL's pipelines have
    it.

    Args:
        vae: the autoencoder; None for pixels.
        applied: the settings of ``AT_USE`` that the pipeline applies, which are not all of them in
            most families.

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
    """Raise AccelkitError unless ``pipe`` makes pictures of latents of so many channels."""
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
