"""How a family's network is called on noisy latents, and on what its samples are conditioned.

A sample is conditioned on an item: a class, a caption, or None for neither. ``encode`` turns items
into rows, tensors by name with one row per item, which can be stored, mixed and sliced;
``arguments`` turns latents and rows into the arguments of a model's call. A family whose call needs
class labels at most has nothing to register.
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

SCALED = frozenset({"scaling_factor"})
SHIFTED = SCALED | {"shift_factor"}
NORMALISED = frozenset({"latents_mean", "latents_std"})


class Conditioning:
    """Class labels for families that have them, nothing for the others.

    Attributes:
        backbone: the network's family.
        text: whether items are captions.
        factor: pixels per latent along a side, read from the pipeline; None until then.
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

        The pipeline's own number is used, as its ``__call__`` uses it even where another
        autoencoder was put into it later.
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
        """Return height and width in pixels of the pictures that ``pipe`` makes by default.

        Raises:
            AccelkitError: its autoencoder cannot decode the network's latents.
        """
        check_autoencoder(pipe, self.shape[0])
        vae = autoencoder_of(pipe)
        return self.shape[-1] * (1 if vae is None else factor_of(vae))

    def upcasts(self, pipe: Any) -> bool:
        """Whether ``pipe`` decodes in float32 if a half-precision autoencoder asks for it."""
        return hasattr(pipe, "upcast_vae")  # the method's name in diffusers before 1.0

    @property
    def learns_variance(self) -> bool:
        """Whether the network returns a variance next to its prediction."""
        config = self.model.config
        # HunyuanDiT's config has no out_channels.
        known = config.get("out_channels") or vars(self.model).get("out_channels")
        return known == 2 * config.in_channels

    def check(self) -> None:
        """Raise AccelkitError for a network that needs an argument of unknown meaning."""
        given = {"timestep", "class_labels"}
        needed = [p.name for p in self._takes[1:] if _required(p) and p.name not in given]
        if needed:
            raise AccelkitError(
                f"accelkit cannot call a {type(self.model).__name__} by itself, to train or sample "
                f"it: what {needed[0]} is to hold is not known; register it with "
                "accelkit.backbones.conditioning.register_conditioning"
            )

    def suits(self, pipe: Any) -> None:
        """Raise AccelkitError if ``pipe`` calls its network differently.

        Also if its autoencoder cannot decode the network's latents.
        """
        check_autoencoder(pipe, self.shape[0])

    def encode(self, pipe: Any, items: Sequence[Item]) -> Rows:
        """Return the rows of ``items``, on the CPU.

        Raises:
            AccelkitError: an item is not one of the model's classes.
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
            rows: B rows of each tensor.
        """
        device = latents.device
        return {
            self._takes[0].name: latents,
            "timestep": self.backbone.model_timestep(timestep),
            **{k: v.to(latents if v.is_floating_point() else device) for k, v in rows.items()},
        }

    def size(self, latents: Tensor) -> list[int]:
        """Return height and width in pixels of the pictures of ``latents``.

        Raises:
            AccelkitError: no pipeline was given to read the pixels per latent from.
        """
        if self.factor is None:
            raise AccelkitError(
                f"a {type(self.model).__name__} is given the size of its pictures, which depends "
                "on its pipeline; give the pipeline to conditioning_of(backbone, pipe)"
            )
        return [self.factor * side for side in latents.shape[-2:]]

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """Return the model's output in the layout of ``latents`` (B, C or 2C, h, w)."""
        return output

    def spacing(self, pipe: Any, steps: int) -> dict[str, Any]:
        """Return what ``pipe`` gives its flow-matching scheduler besides the number of steps.

        These are arguments of ``set_timesteps``: ``sigmas``, ``timesteps``, ``mu``.
        """
        return {}


def _required(parameter: inspect.Parameter) -> bool:
    # Many signatures have a default for the text, but no model that takes text runs without it.
    return parameter.name == "encoder_hidden_states" or (
        parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    )


class Scaled(Conditioning):
    """Class labels, with pipelines that apply nothing but the scaling factor to latents."""

    latent_settings = SCALED


class Captions(Conditioning):
    """Text, embedded by the pipeline's own ``encode_prompt``.

    Attributes:
        returns: the model's arguments for the results of ``encode_prompt`` in order, "" for a
            result that is not used.
        embedding: arguments of ``encode_prompt`` after the prompts.
    """

    text = True
    returns: tuple[str, ...] = ("encoder_hidden_states",)
    embedding: dict[str, Any] = {"do_classifier_free_guidance": False}  # noqa: RUF012

    def check(self) -> None:
        """Accept every network, since the family knows all arguments of a call."""

    def encode(self, pipe: Any, items: Sequence[Item]) -> Rows:
        """Return the embeddings of captions; None is the empty caption.

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
        made = pipe.encode_prompt(prompts, **self.embedding)
        return [(name, v) for name, v in zip(self.returns, made, strict=False) if name]


def refuse_images(model: Any) -> None:
    """Raise AccelkitError for a network that takes an image or a mask next to its sample."""
    takes, returns = model.config.in_channels, model.config.out_channels
    if takes > returns:
        raise AccelkitError(
            f"this {type(model).__name__} takes {takes} channels and returns {returns}; it needs "
            "an image or a mask next to the sample, which accelkit does not train or sample by "
            "itself"
        )


def shift_of(config: Any, tokens: int, most: float = 1.15) -> dict[str, float]:
    """Return ``mu`` for images of so many tokens if a scheduler's sigmas are shifted by it.

    Args:
        config: the scheduler's.
        tokens: number of tokens of an image.
        most: the pipeline's default for ``max_shift``.
    """
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    if not config.get("use_dynamic_shifting"):
        return {}
    lengths = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    shifts = config.get("base_shift", 0.5), config.get("max_shift", most)
    return {"mu": calculate_shift(tokens, *lengths, *shifts)}


_known: dict[str, type[Conditioning]] = {}
LEARNED = "_accelkit_conditioning"
"""Attribute of a network for what was learned from its pipeline
(:mod:`accelkit.backbones.watched`)."""


def register_conditioning(model: str | type, conditioning: type[Conditioning]) -> None:
    """Call models of a class, given itself or by name, as ``conditioning`` does."""
    _known[model if isinstance(model, str) else model.__name__] = conditioning


def conditioning_of(backbone: Backbone, pipe: Any | None = None) -> Conditioning:
    """Return how the network of ``backbone`` is called.

    Args:
        backbone: the network's family.
        pipe: its pipeline, from which the pixels per latent are read; ``encode`` reads them too.

    Raises:
        AccelkitError: its call needs more than class labels, and the rest is not known.
    """
    kinds = (_known.get(kind.__name__) for kind in type(backbone.model).__mro__)
    learned = vars(backbone.model).get(LEARNED, Conditioning)
    conditioning = next((kind for kind in kinds if kind), learned)(backbone)
    conditioning.check()
    if pipe is not None:
        conditioning.read_factor(pipe)
    return conditioning
