"""U-ViT, :class:`accelkit.models.UViTTransformer2DModel`.

The skips of dropped blocks are joined in one product (:mod:`accelkit.backbones.folds`). The kernels
join them without a concatenation, and take a norm's weight w and bias b as a modulation,
LayerNorm(x) (1 + (w - 1)) + b. PyTorch's operators compute what the model's modules do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from accelkit.backbones.folds import Fold
from accelkit.backbones.uvit import UViT
from accelkit.models.uvit import UViTAttention, UViTBlock, UViTMLP
from accelkit.runtime.fused import ops
from accelkit.runtime.fused.base import Block, FusedForward, Pass, Step
from accelkit.runtime.fused.odd import mismatch
from accelkit.runtime.routing import Plan


@dataclass(frozen=True)
class _Block:
    own: Any

    def __call__(
        self, x: Tensor, pending: ops.Pending | None, skip: Tensor | None
    ) -> tuple[Tensor, ops.Pending]:
        """Return the tokens (B, N, D) and the MLP's output, still to be added to them."""
        own = self.own
        if skip is not None:
            x, pending = _join(own, ops.add(x, pending), skip), None  # (B, N, D)
        x, normal = _normed(own.norm1, x, pending)  # (B, N, D) each
        attended = UViTAttention.forward(own.attn, normal)  # bypasses the hook that merges tokens
        x, normal = _normed(own.norm2, x, (attended, None))  # (B, N, D) each
        return x, (own.mlp(normal), None)


class FusedUViT(FusedForward):
    """A U-ViT's forward with kernels between its matrix products."""

    backbone: UViT

    def outside(self) -> list[nn.Module]:
        """Return nothing: all modules other than the blocks are called."""
        return []

    def odd(self, block: Any) -> str | None:
        """Return how a block of encoder, middle or decoder differs from its class, or None."""
        if reason := mismatch({"it": (block, UViTBlock)}):
            return reason
        expected: dict[str, tuple[Any, type | None]] = {
            "its attention": (block.attn, UViTAttention),
            "its MLP": (block.mlp, UViTMLP),
            "its first norm": (block.norm1, nn.LayerNorm),
            "its second norm": (block.norm2, nn.LayerNorm),
        }
        if block.skip_linear is not None:
            expected["its skip_linear"] = (block.skip_linear, nn.Linear)
        if reason := mismatch(expected):
            return reason
        if any(p is None for norm in (block.norm1, block.norm2) for p in (norm.weight, norm.bias)):
            return "its norms have no weights"
        return None

    def build(self, block: Any) -> Block:
        """Return the fused form of a block."""
        return _Block(block)

    def begin(self, plan: Plan, call: dict[str, Any], step: Step | None) -> Pass | None:
        """Return the pass, with the skips of all dropped blocks folded if possible."""
        fold = None
        if plan.active is None:
            fold = self.backbone.folded.at(plan.depth)
            if fold is not None and not fold.fits(call["sample"]):
                fold = None
        return _Pass(self, plan, call, fold)


class _Pass(Pass):
    def __init__(
        self, fused: FusedUViT, plan: Plan, call: dict[str, Any], fold: Fold | None
    ) -> None:
        self._fused, self._plan, self._fold = fused, plan, fold
        sample = call["sample"]
        time = torch.as_tensor(call["timestep"], device=sample.device)  # a tensor or a number
        self.tensors = {"sample": sample, "timestep": time}
        if call.get("class_labels") is not None:
            self.tensors["class_labels"] = call["class_labels"]
        self.key = (plan.depth, plan.active, id(fold))
        self.repeats = plan.active is None and all(fused.blocks)

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the prediction (B, C, S, S)."""
        fused, plan, model = self._fused, self._plan, self._fused.model
        x = model.embed(
            tensors["sample"], tensors["timestep"], tensors.get("class_labels")
        )  # (B, C, S, S) -> (B, N, D)
        pending: ops.Pending | None = None  # the last MLP's output (B, N, D)
        skips: list[Tensor] = []  # (B, N, D) each
        encoder = len(model.in_blocks)
        upto_middle = zip(fused.backbone.all_blocks[: encoder + 1], fused.blocks, strict=False)
        for number, (own, block) in enumerate(upto_middle):
            x, pending = _run(own, block, x, pending, None)  # (B, N, D)
            if number < encoder:
                x, pending = ops.add(x, pending), None
                skips.append(x)
        for index, own in enumerate(model.out_blocks):
            stay = plan.rows_at(index)
            if stay == 0:
                break
            block, skip = fused.blocks[encoder + 1 + index], skips.pop()
            if stay is None or stay == x.shape[0]:
                x, pending = _run(own, block, x, pending, skip)  # (B, N, D)
                continue
            x = ops.add(x, pending)  # (B, N, D)
            ran = ops.add(*_run(own, block, x[:stay], None, skip[:stay]))  # (stay, N, D)
            x, pending = torch.cat([ran, _join(own, x[stay:], skip[stay:])]), None  # (B, N, D)
        x = ops.add(x, pending)  # (B, N, D)
        if skips and self._fold is not None:
            x = ops.skip_linear(x, list(reversed(skips)), self._fold.weight, self._fold.bias)
        else:
            for own in list(model.out_blocks)[len(model.out_blocks) - len(skips) :]:
                x = _join(own, x, skips.pop())  # (B, N, D)
        return model.unembed(x)  # (B, C, S, S)


def _run(
    own: Any, block: Any, x: Tensor, pending: ops.Pending | None, skip: Tensor | None
) -> tuple[Tensor, ops.Pending | None]:
    if block is not None:
        return block(x, pending, skip)
    x = ops.add(x, pending)
    return (own(x) if skip is None else own(x, skip)), None


def _join(own: Any, x: Tensor, skip: Tensor) -> Tensor:
    linear = own.skip_linear
    if type(linear) is not nn.Linear:  # such as an adapter's
        return own.join(x, skip)
    return ops.skip_linear(x, [skip], linear.weight, linear.bias)


def _normed(norm: Any, x: Tensor, pending: ops.Pending | None) -> tuple[Tensor, Tensor]:
    """Return the residual stream with the pending branch added, and its norm."""
    if ops.kernels_for(x) is None:
        x = ops.add(x, pending)
        return x, F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return ops.add_layernorm_modulate(x, pending, norm.bias[None], norm.weight[None] - 1, norm.eps)
