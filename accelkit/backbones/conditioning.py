"""How a family's network is called on noisy latents, and what tells its samples apart.

What a sample is conditioned on is an item: a class, a caption, or None for neither. ``encode``
turns items into rows, tensors by name with one row per item, which can be kept, mixed and cut;
``arguments`` makes a model's call of latents and rows. A family whose call needs no more than class
labels, or nothing, has nothing to register.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accelkit.backbones.autoencoders import (
    AT_USE,
    autoencoder_of,
    check_autoencoder,
    factor_of,
)
from accelkit.backbones.base import Backbone
from accelkit.errors import AccelkitError

Item = int | str | None
Rows = dict[str, Tensor]


class Conditioning:
    """Classes, for families that have them; nothing for those that don't.

    Attributes:
        backbone: the network's family.
        text: whether items are captions.
        factor: pixels per latent along a side, as the pipeline has it; None before it is known.
        latent_settings: settings of the autoencoder that the family's pipelines apply to latents
            (:func:`accelkit.backbones.autoencoders.scaling`).
    """

    text = False
    latent_settings = AT_USE

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.model: Any = backbone.model
        self.factor: int | None = None
        self._takes = list(inspect.signature(type(self.model).forward).parameters.values())[1:]

    def read_factor(self, pipe: Any) -> None:
        """Read from ``pipe`` how many pixels a latent is along a side.

        By the pipeline's own number, as its ``__call__`` has it, also where another autoencoder was
        put into it later.
        """
        vae = autoencoder_of(pipe)
        own = getattr(pipe, "vae_scale_factor", None)
        self.factor = own or (1 if vae is None else factor_of(vae))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample of latents, (C, h, w)."""
        config = self.model.config
        size = config.sample_size
        return config.in_channels, *(size if isinstance(size, (list, tuple)) else (size, size))

    def pixels(self, pipe: Any) -> int:
        """Return height and width in pixels of what ``pipe`` makes by itself.

        Raises:
            AccelkitError: its autoencoder makes no pictures of the network's latents.
        """
        check_autoencoder(pipe, self.shape[0])
        vae = autoencoder_of(pipe)
        return self.shape[-1] * (1 if vae is None else factor_of(vae))

    def upcasts(self, pipe: Any) -> bool:
        """Whether ``pipe`` decodes in float32 where a half-precision autoencoder asks for it."""
        return hasattr(pipe, "upcast_vae")  # as pipelines of diffusers before 1.0 call it

    @property
    def learns_variance(self) -> bool:
        """Whether the network returns a variance beside its prediction."""
        config = self.model.config
        # HunyuanDiT's config does not say
        known = config.get("out_channels") or vars(self.model).get("out_channels")
        return known == 2 * config.in_channels

    def check(self) -> None:
        """Raise AccelkitError for a network whose call needs what is not known here."""
        given = {"timestep", "class_labels"}
        needed = [p.name for p in self._takes[1:] if _required(p) and p.name not in given]
        if needed:
            raise AccelkitError(
                f"accelkit cannot call a {type(self.model).__name__} by itself, to train or sample "
                f"it: what {needed[0]} is to hold is not known; register it with "
                "accelkit.backbones.conditioning.register_conditioning"
            )

    def suits(self, pipe: Any) -> None:
        """Raise AccelkitError for a pipeline that calls its network in another way than here.

        Or one whose autoencoder makes no pictures of the network's latents.
        """
        check_autoencoder(pipe, self.shape[0])

    def encode(self, pipe: Any, items: Sequence[Item]) -> Rows:
        """Return the rows of ``items``, on the CPU.

        Raises:
            AccelkitError: a class that the model lacks.
        """
        count, null = self.backbone.num_classes, self.backbone.null_class
        if count is None:
            return {}
        labels = [null if item is None else item for item in items]
        if None in labels:
            raise AccelkitError(
                f"this {type(self.model).__name__} was never trained without labels; give a class "
                "for each image and no guidance"
            )
        last = count - 1 if null is None else null
        if outside := [n for n in labels if not isinstance(n, int) or not 0 <= n <= last]:
            raise AccelkitError(f"the model has classes 0 to {count - 1}, got {outside[0]}")
        return {"class_labels": torch.tensor(labels)}

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        """Return the arguments of a model's call.

        Args:
            latents: (B, C, h, w), with noise.
            timestep: (B,), the scheduler's.
            rows: B of them.
        """
        device = latents.device
        return {
            self._takes[0].name: latents,
            "timestep": self.backbone.model_timestep(timestep),
            **{k: v.to(latents if v.is_floating_point() else device) for k, v in rows.items()},
        }

    def size(self, latents: Tensor) -> list[int]:
        """Return height and width in pixels of the pictures that ``latents`` stand for.

        Raises:
            AccelkitError: no pipeline has said how many pixels a latent is.
        """
        if self.factor is None:
            raise AccelkitError(
                f"a {type(self.model).__name__} is given the size of its pictures, for which its "
                "pipeline has to be known; give it to conditioning_of(backbone, pipe)"
            )
        return [self.factor * side for side in latents.shape[-2:]]

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """Return what the model returned in the layout of ``latents`` (B, C or 2C, h, w)."""
        return output

    def spacing(self, pipe: Any, steps: int) -> dict[str, Any]:
        """Return what ``pipe`` gives its flow-matching scheduler besides a number of steps.

        These are arguments of ``set_timesteps``: ``sigmas``, ``timesteps``, ``mu``.
        """
        return {}


def _required(parameter: inspect.Parameter) -> bool:
    # text has a default in many a signature, but no model that takes it runs without
    return parameter.name == "encoder_hidden_states" or (
        parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )


class _Scaled(Conditioning):
    """Of pipelines that divide latents by the scaling factor and do nothing else to them."""

    latent_settings = frozenset({"scaling_factor"})


class Captions(Conditioning):
    """Text, embedded by the pipeline's own ``encode_prompt``, whose results are named here.

    Attributes:
        returns: the model's arguments for what ``encode_prompt`` returns, "" for what is left out.
    """

    text = True
    returns: tuple[str, ...] = ("encoder_hidden_states",)

    def check(self) -> None:
        """All that a call needs is known."""

    def encode(self, pipe: Any, items: Sequence[Item]) -> Rows:
        """Return the embeddings of captions, None being the empty one.

        Raises:
            AccelkitError: an item is a class.
        """
        self.read_factor(pipe)
        prompts = ["" if item is None else item for item in items]
        if strange := [p for p in prompts if not isinstance(p, str)]:
            raise AccelkitError(
                f"a {type(self.model).__name__} is prompted by text, got class {strange[0]}"
            )
        with torch.no_grad():
            return {name: value.detach().cpu() for name, value in self._embed(pipe, prompts)}

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        made = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return [(name, v) for name, v in zip(self.returns, made, strict=False) if name]


_known: dict[str, type[Conditioning]] = {}
LEARNED = "_accelkit_conditioning"
"""Where a network carries what its pipeline showed (:mod:`accelkit.backbones.watched`)."""


def register_conditioning(model: str | type, conditioning: type[Conditioning]) -> None:
    """Let models of a class, given it or its name, be called as ``conditioning`` says."""
    _known[model if isinstance(model, str) else model.__name__] = conditioning


def conditioning_of(backbone: Backbone, pipe: Any | None = None) -> Conditioning:
    """Return how the network of ``backbone`` is called.

    Args:
        backbone: the network's family.
        pipe: its pipeline, which says how many pixels a latent is. Encoding items says so as well.

    Raises:
        AccelkitError: its call needs more than class labels, and what is not known.
    """
    kinds = (_known.get(kind.__name__) for kind in type(backbone.model).__mro__)
    learned = vars(backbone.model).get(LEARNED, Conditioning)
    conditioning = next((kind for kind in kinds if kind), learned)(backbone)
    conditioning.check()
    if pipe is not None:
        conditioning.read_factor(pipe)
    return conditioning


register_conditioning("DiTTransformer2DModel", _Scaled)
register_conditioning("UNet2DModel", _Scaled)  # LDMPipeline's
