"""PixArt-alpha and -Sigma in diffusers, ``PixArtTransformer2DModel``.

The six vectors of a block are its own table plus vectors of the timestep that all blocks share, so
that one sum serves all blocks. A block differs from a DiT's in its attention to the caption, which
has neither norm nor gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from accelkit.runtime.fused import ops, parts
from accelkit.runtime.fused.base import Block, FusedForward, Pass, Step
from accelkit.runtime.fused.modulation import Modulations
from accelkit.runtime.fused.odd import mismatch
from accelkit.runtime.routing import Plan

_VECTORS = 6
_OF_SAMPLES = (
    "hidden_states",
    "encoder_hidden_states",
    "timestep",
    "attention_mask",
    "encoder_attention_mask",
)


@dataclass(frozen=True)
class _Block:
    attention: parts.SelfAttention
    caption: parts.CrossAttention
    mlp: parts.MLP
    eps: tuple[float, float]

    def __call__(
        self,
        x: Tensor,
        pending: ops.Pending | None,
        vectors: tuple[Tensor, ...],
        caption: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, ops.Pending]:
        """Return the residual stream (B, N, D) and the MLP's output, still to be added to it."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors  # (B, D) each
        of_tokens, of_caption = masks  # (B, 1, 1, N), (B, 1, 1, L)
        x, normal = ops.add_layernorm_modulate(x, pending, shift, scale, self.eps[0])  # (B, N, D)
        x = ops.add(x, (self.attention(normal, of_tokens), gate))  # (B, N, D)
        seen = self.caption(x, caption, of_caption)  # (B, N, D)
        x, normal = ops.add_layernorm_modulate(x, (seen, None), shift_mlp, scale_mlp, self.eps[1])
        return x, (self.mlp(normal), gate_mlp)


class FusedPixArt(FusedForward):
    """A PixArt's forward in few, large operations."""

    def outside(self) -> list[nn.Module]:
        """Return the final norm and the projection."""
        return [self.model.norm_out, self.model.proj_out]

    def odd(self, block: Any) -> str | None:
        """Return how a block differs from a plain adaLN-single block, or None."""
        if reason := mismatch({"it": (block, BasicTransformerBlock)}):
            return reason
        if block.norm_type != "ada_norm_single" or block.attn2 is None:
            return "its conditioning is not adaLN-single with a caption"
        expected: dict[str, tuple[Any, type | None]] = {
            "its first norm": (block.norm1, nn.LayerNorm),
            "its second norm": (block.norm2, nn.LayerNorm),
            "its positions": (block.pos_embed, None),
            "its chunk size": (block._chunk_size, None),
        }
        reason = mismatch(expected) or parts.odd_attention(block.attn1)
        reason = reason or parts.odd_attention(block.attn2) or parts.odd_mlp(block.ff)
        if reason is not None:
            return reason
        if block.norm1.weight is not None or block.norm2.weight is not None:
            return "its norms have weights"
        return None

    def joins(self, block: Any) -> list[Tensor]:
        """Return the weights of queries, keys and values, and the block's vectors."""
        own = parts.joined_weights(block.attn1) + parts.joined_weights(block.attn2)
        return [*own, block.scale_shift_table]

    def build(self, block: Any) -> Block:
        """Return the fused form of an adaLN-single block."""
        return _Block(
            parts.self_attention(block.attn1, self.joined),
            parts.cross_attention(block.attn2, self.joined),
            parts.mlp(block.ff),
            (block.norm1.eps, block.norm2.eps),
        )

    def odd_outside(self) -> str | None:
        """Return what is unusual in the final norm or the projection, or None."""
        ends: dict[str, tuple[Any, type | None]] = {
            "its last norm": (self.model.norm_out, nn.LayerNorm),
            "its last norm's weight": (getattr(self.model.norm_out, "weight", None), None),
            "its last layer": (self.model.proj_out, nn.Linear),
        }
        return mismatch(ends)

    def built(self) -> None:
        """Join the tables of all blocks."""
        blocks: Any = self.backbone.blocks
        self.tables = self.joined([block.scale_shift_table for block in blocks])  # (6 L, D)
        scales = [_VECTORS * n + i for n in range(len(self.blocks)) for i in (1, 4)]
        self.scales = torch.tensor(scales, device=self.tables.device)

    def begin(self, plan: Plan, call: dict[str, Any], step: Step | None) -> Pass | None:
        """Return the pass; None for a call that the model refuses or has to run itself."""
        if call.get("cross_attention_kwargs") is not None:
            return None
        if self.model.config.use_additional_conditions and not call.get("added_cond_kwargs"):
            return None
        if any(not isinstance(call.get(k), Tensor) for k in ("encoder_hidden_states", "timestep")):
            return None
        given = [call.get(name) for name in _OF_SAMPLES]
        if any(
            isinstance(v, Tensor) and v.shape[:1] != call[_OF_SAMPLES[0]].shape[:1] for v in given
        ):
            return None  # the model raises its own error
        return _Pass(self, plan, call)


class _Pass(Pass):
    def __init__(self, fused: FusedPixArt, plan: Plan, call: dict[str, Any]) -> None:
        self._fused, self._plan = fused, plan
        flat = call | (call.get("added_cond_kwargs") or {})
        self.tensors = {k: v for k, v in flat.items() if isinstance(v, Tensor)}
        self._added = list(call.get("added_cond_kwargs") or {})
        self.key = (plan.depth, plan.active)
        self.repeats = plan.active is None and all(fused.blocks[: plan.depth])

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the prediction (B, C or 2C, H, W)."""
        fused, plan, model = self._fused, self._plan, self._fused.model
        sample, caption = tensors["hidden_states"], tensors["encoder_hidden_states"]  # (B, L, E)
        count, patch = len(sample), model.config.patch_size
        grid = (sample.shape[-2] // patch, sample.shape[-1] // patch)
        x = model.pos_embed(sample).contiguous()  # (B, N, D)
        given = {name: tensors.get(name) for name in self._added}
        time, embedded = model.adaln_single(
            tensors["timestep"], given, batch_size=count, hidden_dtype=x.dtype
        )  # (B, 6 D), (B, D)
        if model.caption_projection is not None:
            caption = model.caption_projection(caption).view(count, -1, x.shape[-1])  # (B, L, D)
        biases = tuple(
            _bias(tensors.get(name), x) for name in ("attention_mask", "encoder_attention_mask")
        )  # (B, 1, N), (B, 1, L)
        tables = fused.tables[: _VECTORS * plan.depth].unflatten(0, (plan.depth, _VECTORS))
        table = tables[None] + time.unflatten(1, (1, _VECTORS, -1))  # (B, depth, 6, D)
        modulations = Modulations(
            ops.with_factors(table.flatten(1, 2), fused.scales[: 2 * plan.depth])
        )
        pending: ops.Pending | None = None  # the last branch and its gate, (B, N, D) and (B, D)
        left: list[Tensor] = []  # (b, N, D) each: samples that finished, the last ones last
        for number, block in enumerate(fused.blocks[: plan.depth]):
            stay = plan.rows_at(number)
            if stay is not None and stay < x.shape[0]:
                x, pending = ops.add(x, pending), None  # (B, N, D)
                left.append(x[stay:])  # (B - stay, N, D)
                x, caption, time = x[:stay], caption[:stay], time[:stay]  # B is smaller from here
                biases = tuple(None if b is None else b[:stay] for b in biases)
            if block is not None:
                start = _VECTORS * number
                vectors = modulations.take(start, start + _VECTORS, x.shape[0])  # 6 of (B, D)
                masks = tuple(None if b is None else b[:, None] for b in biases)  # for all heads
                x, pending = block(x, pending, vectors, caption, masks)  # (B, N, D)
            else:
                x, pending = ops.add(x, pending), None
                x = fused.backbone.blocks[number](
                    x,
                    attention_mask=biases[0],
                    encoder_hidden_states=caption,
                    encoder_attention_mask=biases[1],
                    timestep=time,
                )  # (B, N, D)
        x = ops.add(x, pending)  # (B, N, D)
        if left:
            x = torch.cat([x, *reversed(left)])  # the whole batch in its order
        ends = model.scale_shift_table[None] + embedded[:, None]  # (B, 2, D)
        shift, scale = ops.with_factors(ends, fused.scales[:1]).unbind(1)  # (B, D) each
        last = model.proj_out
        return ops.exit_head(
            x, shift, scale, last.weight, last.bias, grid, patch, model.norm_out.eps
        )  # (B, C or 2C, H, W)


def _bias(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the bias of attention scores (B, 1, keys) for a mask of ones, or for such a bias."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(x.dtype)) * -10000.0)[:, None]
