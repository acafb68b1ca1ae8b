"""U-ViT: :class:`accelkit.models.UViTTransformer2DModel`.

Only the decoder's blocks are counted. The encoder, the middle block and what follows the decoder
always run, and a skipped block still joins its long skip: it runs its ``skip_linear`` and nothing
else (Moon et al. 2024, section 3.2 and appendix). The last blocks are skipped first, so that a
depth of 0 leaves the whole chain of these projections, which is folded into one (uvit_fold.py).
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
        """How many labels there are, the null class not counted; None without labels."""
        config: Any = self.model.config
        return config.num_classes if config.null_class is None else config.null_class

    @property
    def exit(self) -> nn.Module:
        """The final norm."""
        return self.model.norm  # type: ignore[return-value]

    @property
    def null_class(self) -> int | None:
        """The label that stands for none; None if the network never saw one missing."""
        return self.model.config.null_class  # type: ignore[union-attr, return-value]

    @property
    def tokens_protected(self) -> int:  # type: ignore[override]
        """Time and, with classes, label."""
        return self.model.extras  # type: ignore[return-value]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The MLP behind the sinusoids, which no released model has."""
        return [self.model.time_embed]  # type: ignore[list-item]

    def attentions(self) -> list[list[nn.Module]]:
        """Return the self-attention of every block; positions were added to the tokens before."""
        return [[block.attn] for block in self.all_blocks]  # type: ignore[list-item]

    def skipped(self, index: int, call: dict[str, Any], depth: int | None) -> Tensor:
        """Return the tokens with the long skip joined."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.folded.clear()  # weights are about to change
        return self.blocks[index].join(call["hidden_states"], call["skip"])  # type: ignore[operator]

    def shortcut(
        self, depth: int, hidden: Tensor
    ) -> Callable[[list[dict[str, Any]]], Tensor] | None:
        """Return what joins all long skips from ``depth`` on at once, without gradients."""
        fold = self._fold_for(depth, hidden)
        if fold is None:
            return None
        return lambda calls: fold(calls[0]["hidden_states"], [call["skip"] for call in calls])

    def prepare(self, depth: int) -> None:
        """Fold the skips behind ``depth`` blocks."""
        self.folded.at(depth)

    def _fold_for(self, depth: int, hidden: Tensor) -> Fold | None:
        if torch.is_grad_enabled():
            return None
        # a compiled graph cannot see whether weights changed: `prepare` did
        fold = self.folded.made(depth) if torch.compiler.is_compiling() else self.folded.at(depth)
        if fold is None or not fold.fits(hidden):  # weights may be cast or moved when they run
            return None
        return fold

    def model_timestep(self, timestep: Tensor) -> Tensor:
        """Return the numbers that the network is given for indices 0..999."""
        return self.model.timestep_of(timestep)  # type: ignore[operator]

    def scheduler_timestep(self, timestep: float) -> float:
        """Return the index 0..999 of the number that the network is given."""
        return self.model.index_of(timestep)  # type: ignore[operator]

    def initialize(self, seed: int) -> None:
        """Initialise for training from scratch as published."""
        torch.manual_seed(seed)
        self.model.initialize()  # type: ignore[operator]
