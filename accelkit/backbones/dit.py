"""DiT in diffusers: ``DiTTransformer2DModel``.

A skipped block runs nothing. The exit needs no extra head: the final norm, modulation and
projection run on the hidden states of the last block kept (Moon et al. 2024, section 3.2). The
final modulation takes its conditioning from block 0's embedder, which every depth keeps.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import Scaled
from accelkit.backbones.registry import family
from accelkit.errors import AccelkitError, AccelkitWarning

NORM_EPS = 1e-6  # the original's; diffusers' is 1e-5
FREQ_SHIFT = (
    0  # the original's; the frequencies' exponent is divided by 128 - shift, diffusers' by 127
)
SHIFT_KEY = "timestep_freq_shift"  # entry in config.json for the shift
NULL_KEY = "null_class"  # entry in config.json, null if the label table has no null class


@family("DiTTransformer2DModel", called=Scaled)
class DiT(Backbone):
    """The (28 or any number of) adaLN-Zero blocks of a class-conditional DiT."""

    family = "dit"
    blocks: Any = "transformer_blocks"
    exit: Any = "norm_out"
    self_attention = "attn1"
    batched = ("hidden_states", "class_labels")
    block_batched = ("timestep", "class_labels")
    head = ("proj_out_1", "proj_out_2")

    @property
    def null_class(self) -> int | None:
        """The label table's last row, unless the config records that there is no null class."""
        config: Any = self.model.config
        return config.get(NULL_KEY, config.num_embeds_ada_norm)

    @property
    def num_classes(self) -> int:
        """The number of labels without the null class."""
        config: Any = self.model.config
        return config.num_embeds_ada_norm + (self.null_class is None)

    @property
    def _embedders(self) -> list[Any]:
        return [block.norm1.emb for block in self.blocks]

    def restore(self) -> None:
        """Apply the original DiT's timestep frequencies if the config records them."""
        restore_numerics(self.model)

    def check(self) -> None:
        """Warn if the config records the original's frequencies but diffusers' are in use."""
        recorded = self.model.config.get("timestep_freq_shift")  # type: ignore[union-attr, operator]
        used = {e.time_proj.downscale_freq_shift for e in self._embedders}
        if recorded is not None and used != {recorded}:
            warnings.warn(
                "this DiT was converted from an original checkpoint and needs its timestep "
                "frequencies, which plain diffusers does not restore: load it with "
                "accelkit.from_pretrained",
                AccelkitWarning,
                stacklevel=3,
            )

    def notes(self) -> dict[str, Any]:
        """Return the timestep frequencies and norm epsilon in use, and whether embedders agree."""
        return {
            **numerics(self.model),
            "embedders_equal": self.embedders_equal,
        }

    def initialize(self, seed: int) -> None:
        """Initialise for training from scratch as published.

        Linear layers Xavier-uniform with zero bias, embedders N(0, 0.02^2), every modulation and
        the final projection zero, so that the untrained network returns exactly 0
        (Peebles and Xie 2023, section 3.2, adaLN-Zero).
        """
        torch.manual_seed(seed)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches: Any = self.model.pos_embed.proj  # type: ignore[union-attr]
        nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
        nn.init.zeros_(patches.bias)
        first, *others = self._embedders
        time, label = first.timestep_embedder, first.class_embedder
        for module in (time.linear_1, time.linear_2, label.embedding_table):
            nn.init.normal_(module.weight, std=0.02)
        for other in others:  # diffusers keeps a copy of the one embedder in every block.
            other.load_state_dict(first.state_dict())
        modulations = [block.norm1.linear for block in self.blocks]
        for zero in (*modulations, self.model.proj_out_1, self.model.proj_out_2):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    @property
    def embedders_equal(self) -> bool:
        """Whether all blocks' timestep and label embedders hold the same weights, bit for bit."""
        first, *others = (list(e.parameters()) for e in self._embedders)
        return all(
            a is b or torch.equal(a, b)
            for other in others
            for a, b in zip(first, other, strict=True)
        )

    @contextmanager
    def training(self, freeze_time: bool = False) -> Iterator[None]:
        """Make the model trainable like the original network while the context is entered.

        diffusers gives every block its own copy of one embedder. Without this, the copies drift
        apart and each draws its own label dropout, which leaves a sample half conditional. In this
        context, equal copies are one shared module and their dropout is off: labels are dropped
        once, by the caller.

        Args:
            freeze_time: keep the timestep embedders out of the training.
        """
        embedders = self._embedders
        drops = [e.class_embedder.dropout_prob for e in embedders]
        parts = [(e.timestep_embedder, e.class_embedder) for e in embedders]
        shared = self.embedders_equal
        for embedder in embedders:
            if shared:
                embedder.timestep_embedder, embedder.class_embedder = parts[0]
            embedder.class_embedder.dropout_prob = 0.0
            embedder.timestep_embedder.requires_grad_(not freeze_time)
        try:
            yield
        finally:
            for embedder, (time, label), drop in zip(embedders, parts, drops, strict=True):
                if shared:
                    with torch.no_grad():
                        for own, common in zip((time, label), parts[0], strict=True):
                            if own is not common:
                                own.load_state_dict(common.state_dict())
                embedder.timestep_embedder = time.requires_grad_()
                embedder.class_embedder = label
                label.dropout_prob = drop


def restore_numerics(model: Any) -> None:
    """Apply the timestep frequencies that the model's config records, if it records any.

    ``from_pretrained`` keeps the entry that :func:`accelkit.layouts.dit.read` wrote to
    ``config.json`` (and warns that it is ignored) but builds diffusers' frequencies. Repeated calls
    have no further effect.

    Raises:
        AccelkitError: the recorded ``timestep_freq_shift`` is neither 0 nor 1.
    """
    shift = model.config.get(SHIFT_KEY)
    if shift is None:
        return
    if shift not in (0, 1):
        raise AccelkitError(f"{SHIFT_KEY}={shift!r} in the config; expected 0 (original) or 1")
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift


def numerics(model: Any) -> dict[str, str | float]:
    """Return the values in use of the constants that differ between the original and diffusers.

    Returns:
        ``timestep_frequencies``: ``"original"`` (10000^(-i/128)), ``"diffusers"``
        (10000^(-i/127)), ``"other"``, or ``"mixed"`` if blocks differ. ``norm_eps``: eps of the
        norm before the MLP (original 1e-6), or ``"mixed"``.
    """
    shifts = {block.norm1.emb.time_proj.downscale_freq_shift for block in model.transformer_blocks}
    epsilons = {block.norm3.eps for block in model.transformer_blocks}
    names = {FREQ_SHIFT: "original", 1: "diffusers"}
    return {
        "timestep_frequencies": names.get(shifts.pop(), "other") if len(shifts) == 1 else "mixed",
        "norm_eps": epsilons.pop() if len(epsilons) == 1 else "mixed",
    }
