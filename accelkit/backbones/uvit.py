"""U-ViT: :class:`accelkit.models.UViTTransformer2DModel`.

Only the decoder's blocks are counted. The encoder, the middle block and the layers after the
decoder always run, and a skipped block still joins its long skip: it runs its ``skip_linear`` and
nothing else (Moon et al. 2024, section 3.2 and appendix). The last blocks are skipped first, so
that at a depth of 0 the whole chain of these projections remains, folded into one (folds.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones.base import Backbone
from accelkit.backbones.folds import Fold, FoldedSkips
from accelkit.backbones.registry import family


@family("UViTTransformer2DModel")
class UViT(Backbone):
    """The decoder blocks of a U-ViT, half of all but the middle one."""

    family = "uvit"
    least = 0
    sequential = False
    batched = ("sample", "class_labels")
    block_batched = ("skip",)
    head = ("norm", "decoder_pred", "final_layer")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.folded = FoldedSkips(self.blocks)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's blocks."""
        return self.model.out_blocks  # type: ignore[return-value]

    @property
    def all_blocks(self) -> list[nn.Module]:
        """Encoder, middle block and decoder."""
        model: Any = self.model
        return [*model.in_blocks, model.mid_block, *model.out_blocks]

    @property
    def num_classes(self) -> int | None:
        """Number of labels without the null class; None without labels."""
        config: Any = self.model.config
        return config.num_classes if config.null_class is None else config.null_class

    @property
    def exit(self) -> nn.Module:
        """The final norm."""
        return self.model.norm  # type: ignore[return-value]

    @property
    def null_class(self) -> int | None:
        """The label for no class; None if the network was never trained without labels."""
        return self.model.config.null_class  # type: ignore[union-attr, return-value]

    @property
    def tokens_protected(self) -> int:  # type: ignore[override]
        """Tokens before the map: the time's and, with classes, the label's."""
        return self.model.extras  # type: ignore[return-value]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The MLP after the sinusoids, which no released model has."""
        return [self.model.time_embed]  # type: ignore[list-item]

    def attentions(self) -> list[list[nn.Module]]:
        """Return the self-attention of every block, which takes positions as part of its tokens."""
        return [[block.attn] for block in self.all_blocks]  # type: ignore[list-item]

    def skipped(self, index: int, call: dict[str, Any], depth: int | None) -> Tensor:
        """Return the tokens with the long skip joined."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.folded.clear()  # weights are about to change
        return self.blocks[index].join(call["hidden_states"], call["skip"])  # type: ignore[operator]

    def shortcut(
        self, depth: int, hidden: Tensor
    ) -> Callable[[list[dict[str, Any]]], Tensor] | None:
        """Return a function that joins all long skips from ``depth`` on, without gradients."""
        fold = self._fold_for(depth, hidden)
        if fold is None:
            return None
        return lambda calls: fold(calls[0]["hidden_states"], [call["skip"] for call in calls])

    def prepare(self, depth: int) -> None:
        """Fold the skips after the first ``depth`` blocks."""
        self.folded.at(depth)

    def _fold_for(self, depth: int, hidden: Tensor) -> Fold | None:
        if torch.is_grad_enabled():
            return None
        # A compiled graph cannot check for changed weights; `prepare` did.
        fold = self.folded.made(depth) if torch.compiler.is_compiling() else self.folded.at(depth)
        if fold is None or not fold.fits(hidden):  # weights may be cast or moved as they run
            return None
        return fold

    def model_timestep(self, timestep: Tensor) -> Tensor:
        """Return the network's inputs for the indices 0..999."""
        return self.model.timestep_of(timestep)  # type: ignore[operator]

    def scheduler_timestep(self, timestep: float) -> float:
        """Return the index 0..999 of a number given to the network."""
        return self.model.index_of(timestep)  # type: ignore[operator]

    def initialize(self, seed: int) -> None:
        """Initialise for training from scratch as published."""
        torch.manual_seed(seed)
        self.model.initialize()  # type: ignore[operator]
