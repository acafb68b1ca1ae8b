"""DiT in diffusers, ``DiTTransformer2DModel``, with its conditioning computed once.

diffusers embeds timestep and label in each block, with embedders whose weights are equal in every
published model. If they are equal bit for bit, one of them is run for all; and the modulations of
all blocks are one matrix product over the distinct pairs of timestep and label.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from accelkit.backbones import DiT, stale
from accelkit.runtime.fused import ops, parts, threads
from accelkit.runtime.fused.base import Block, FusedForward, Pass, Step
from accelkit.runtime.fused.modulation import Distinct, Modulations, StepTable
from accelkit.runtime.fused.odd import mismatch, unfit, unusual
from accelkit.runtime.routing import Plan

_VECTORS = 6  # vectors of a block: shift, scale and gate of its attention, then of its MLP
_LAST = 2  # vectors of the final norm, which come first in a table: shift and scale


@dataclass(frozen=True)
class _Block:
    attention: parts.SelfAttention
    mlp: parts.MLP
    eps: tuple[float, float]

    def __call__(
        self, x: Tensor, pending: ops.Pending | None, vectors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ops.Pending]:
        """Return the residual stream (B, N, D) and the MLP's output, still to be added to it."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors  # (B, D) or (1, D) each
        x, normal = ops.add_layernorm_modulate(x, pending, shift, scale, self.eps[0])  # (B, N, D)
        attended = self.attention(normal), gate  # (B, N, D), (B, D)
        x, normal = ops.add_layernorm_modulate(x, attended, shift_mlp, scale_mlp, self.eps[1])
        return x, (self.mlp(normal), gate_mlp)


class FusedDiT(FusedForward):
    """A DiT's forward in few, large operations."""

    backbone: DiT

    def __init__(self, backbone: DiT) -> None:
        super().__init__(backbone)
        self.run = _Run()
        self._embedders: list[Any] = []
        self._embedding: list[Tensor] = []  # parameters of the embedders in use
        self._weights: list[Tensor] = []  # all parameters that the vectors depend on
        self.indivisible = False  # whether a hook on the patch embedder may depend on the batch

    def outside(self) -> list[nn.Module]:
        """Return the final norm, its modulation and the projection."""
        return [self.model.norm_out, self.model.proj_out_1, self.model.proj_out_2]

    def odd(self, block: Any) -> str | None:
        """Return how a block differs from a plain adaLN-Zero block, or None."""
        if reason := mismatch({"it": (block, BasicTransformerBlock)}):
            return reason
        if reason := mismatch({"its first norm": (block.norm1, AdaLayerNormZero)}):
            return reason
        expected: dict[str, tuple[Any, type | None]] = {
            "its modulation": (block.norm1.linear, nn.Linear),
            "its second norm": (block.norm3, nn.LayerNorm),
            "its cross-attention": (block.attn2, None),
            "its chunk size": (block._chunk_size, None),
        }
        reason = mismatch(expected) or parts.odd_attention(block.attn1) or parts.odd_mlp(block.ff)
        if reason is not None:
            return reason
        if block.norm1.norm.weight is not None or block.norm3.weight is not None:
            return "its norms have weights"
        if block.norm1.linear.bias is None:
            return "its modulation has no bias"
        return _odd(block.norm1.emb)

    def joins(self, block: Any) -> list[Tensor]:
        """Return the weights of queries, keys and values, and those of the modulation."""
        own = parts.joined_weights(block.attn1)
        return [*own, block.norm1.linear.weight, block.norm1.linear.bias]

    def build(self, block: Any) -> Block:
        """Return the fused form of an adaLN-Zero block."""
        return _Block(
            parts.self_attention(block.attn1, self.joined),
            parts.mlp(block.ff),
            (block.norm1.norm.eps, block.norm3.eps),
        )

    def odd_outside(self) -> str | None:
        """Return what is unusual in the final norm, its modulation or the projection, or None."""
        model = self.model
        ends: dict[str, tuple[Any, type | None]] = {
            "its last norm": (model.norm_out, nn.LayerNorm),
            "its last norm's weight": (getattr(model.norm_out, "weight", None), None),
            "its last modulation": (model.proj_out_1, nn.Linear),
            "its last layer": (model.proj_out_2, nn.Linear),
        }
        if reason := mismatch(ends):
            return reason
        if model.proj_out_1.bias is None:
            return "its last modulation has no bias"
        first: Any = self.backbone.blocks[0]
        embedder = first.norm1.emb  # which conditions the final norm
        return unusual([embedder]) or unfit([embedder], model.proj_out_1.weight) or _odd(embedder)

    def built(self) -> None:
        """Join the layers that compute the modulations of the final norm and all fused blocks."""
        blocks: Any = self.backbone.blocks
        self.fused = [number for number, block in enumerate(self.blocks) if block is not None]
        self._layers = [
            self.model.proj_out_1,
            *(blocks[number].norm1.linear for number in self.fused),
        ]
        self.weight = self.joined([layer.weight for layer in self._layers])  # ((2 + 6 L) D, D)
        self.bias = self.joined([layer.bias for layer in self._layers])
        self._embedders = [block.norm1.emb for block in blocks]
        asked = [self._embedders[number] for number in {0, *self.fused}]
        self._embedding = [p for embedder in asked for p in embedder.parameters()]
        self.indivisible = unusual([self.model.pos_embed]) is not None
        self._weights = [p for layer in self._layers for p in layer.parameters()] + self._embedding
        self.run = _Run()
        scales = [_LAST + _VECTORS * n + i for n in range(len(self.fused)) for i in (1, 4)]
        self._scales = torch.tensor([1, *scales], device=self.bias.device)

    def begin(self, plan: Plan, call: dict[str, Any], step: Step | None) -> Pass | None:
        """Embed the distinct pairs of timestep and label, and return the pass."""
        sample, timestep = call["hidden_states"], call.get("timestep")
        labels = call.get("class_labels")
        if not isinstance(timestep, Tensor) or not isinstance(labels, Tensor):
            return None
        if timestep.ndim != 1 or labels.ndim != 1 or call.get("cross_attention_kwargs") is not None:
            return None
        if labels.dtype not in (torch.int64, torch.int32):
            return None  # the model raises its own error
        if self.model.training or sample.shape[-1] != sample.shape[-2]:
            return None  # labels are dropped at random; diffusers treats any map as square
        if not {len(timestep), len(labels)} <= {1, len(sample)} or not sample.numel():
            return None  # the model raises its own error
        patches = self.model.pos_embed.proj.weight  # (D, C, P, P)
        if (sample.shape[1], sample.dtype) != (patches.shape[1], patches.dtype):
            return None  # here as well
        modulations = self.modulations(plan.depth, timestep, labels, sample.dtype, step)
        if self.graphs is not None:  # the sizes of a graph must not depend on the labels
            modulations = modulations.of_each(len(sample))
        return _Pass(self, plan, sample, timestep, labels, modulations)

    def modulations(
        self, depth: int, timestep: Tensor, labels: Tensor, dtype: torch.dtype, step: Step | None
    ) -> Modulations:
        """Return the vectors of a batch for the final norm and the first ``depth`` blocks."""
        run = self.run
        times, classes, index = run.distinct(timestep, labels)
        if not run.distinct.repeated:
            run.equal = None
        count = bisect_left(self.fused, depth)
        table = None if step is None else self._tabulated(step, timestep, classes, dtype)
        if table is None:
            table = self._table(times, classes, count, dtype)
        return Modulations(table[:, : _LAST + _VECTORS * count], index)

    def _tabulated(
        self, step: Step, timestep: Tensor, classes: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Return the vectors of a step from the table of its run, None without a table."""
        steps, place = step
        if timestep.dtype in (torch.bfloat16, torch.float16):  # several steps may be rounded to it
            return None
        if len(steps) < 2 or steps.is_inference():
            return None
        shape = (len(steps), len(classes), _LAST + _VECTORS * len(self.fused), self.model.inner_dim)

        def make() -> Tensor:
            times = steps.to(timestep).repeat_interleave(len(classes))
            pairs = self._table(times, classes.repeat(len(steps)), len(self.fused), dtype)
            return pairs.view(shape)

        size = math.prod(shape) * self.weight.element_size()
        run, sources = (steps, classes, timestep.dtype), [steps, *self._weights]
        return self.run.steps.at(run, sources, place, size, make)

    def _table(self, times: Tensor, classes: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Return the vectors of pairs of timestep and label, (P, 2 + 6 count, D)."""
        rows = (_LAST + _VECTORS * count) * self.model.inner_dim
        embedders = self._embedders
        if self._embedders_equal():
            hidden = F.silu(embedders[0](times, classes, hidden_dtype=dtype))  # (P, D)
            table = F.linear(hidden, self.weight[:rows], self.bias[:rows])  # (P, rows)
        else:  # trained separately; the final norm uses the first block's embedder
            embedders = [embedders[number] for number in (0, *self.fused[:count])]
            rows_of = [
                F.linear(F.silu(e(times, classes, hidden_dtype=dtype)), layer.weight, layer.bias)
                for e, layer in zip(embedders, self._layers, strict=False)
            ]
            table = torch.cat(rows_of, dim=1)  # (P, rows)
        table = table.unflatten(1, (-1, self.model.inner_dim))  # (P, 2 + 6 count, D)
        return ops.with_factors(table, self._scales[: 1 + 2 * count])

    def _embedders_equal(self) -> bool:
        """Whether all embedders have the same weights.

        Compared again if one was written to (:mod:`accelkit.backbones.stale`), and whenever labels
        change, since an EMA's weights may be swapped in through ``.data`` before a run.
        """
        known = self.run.equal
        if known is None or not known[0].same():
            known = self.run.equal = (stale.writes(self._embedding), self.backbone.embedders_equal)
        return known[1]


def _odd(embedder: Any) -> str | None:
    """Return why an embedder cannot be run for a table, or None."""
    if reason := mismatch({"its embedder": (embedder, CombinedTimestepLabelEmbeddings)}):
        return reason
    label = embedder.class_embedder
    return "label dropout in training" if label.training and label.dropout_prob > 0 else None


class _Run(threading.local):
    """A thread's sampling run. Other threads may have other labels or steps."""

    def __init__(self) -> None:
        self.distinct = Distinct()
        self.equal: tuple[stale.Seen, bool] | None = None  # the embedders as they were compared
        self.steps = StepTable()


class _Pass(Pass):
    def __init__(
        self,
        fused: FusedDiT,
        plan: Plan,
        sample: Tensor,
        timestep: Tensor,
        labels: Tensor,
        modulations: Modulations,
    ) -> None:
        self._fused, self._plan = fused, plan
        self.tensors = {"sample": sample, "table": modulations.table}
        if modulations.index is not None:
            self.tensors["index"] = modulations.index
        if not all(fused.blocks[: plan.depth]):
            self.tensors |= {"timestep": timestep, "labels": labels}
        self.key = (plan.depth, plan.active)
        self.repeats = plan.active is None and all(fused.blocks[: plan.depth])

    def __call__(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return the prediction (B, C or 2C, H, W)."""
        sample, model = tensors["sample"], self._fused.model  # (B, C, H, H)
        tokens = (sample.shape[-1] // model.patch_size) ** 2
        count, workers = threads.share(sample, tokens, 4 * model.inner_dim)
        if self._fused.indivisible or not self.repeats or len(sample) <= count:
            return self._run(tensors)
        shared = {"table"} if "index" in tensors or len(tensors["table"]) == 1 else set()
        split = {k: v.split(count) for k, v in tensors.items() if k not in shared and len(v) > 1}
        whole = {k: v for k, v in tensors.items() if k not in split}
        pieces = zip(*split.values(), strict=True)
        runs = (whole | dict(zip(split, piece, strict=True)) for piece in pieces)
        return torch.cat(threads.each(self._run, runs, workers))

    def _run(self, tensors: dict[str, Tensor]) -> Tensor:
        fused, plan, model = self._fused, self._plan, self._fused.model
        modulations = Modulations(tensors["table"], tensors.get("index"))  # (P, 2 + 6 L, D), (B,)
        x = model.pos_embed(tensors["sample"]).contiguous()  # (B, C, H, H) -> (B, N, D)
        grid = (tensors["sample"].shape[-1] // model.patch_size,) * 2  # N = grid[0] grid[1]
        pending: ops.Pending | None = None  # the last branch and its gate, (B, N, D) and (B, D)
        left: list[Tensor] = []  # (b, N, D) each: samples that finished, the last ones last
        start = _LAST
        for number, block in enumerate(fused.blocks[: plan.depth]):
            stay = plan.rows_at(number)
            if stay is not None and stay < x.shape[0]:
                x, pending = ops.add(x, pending), None  # (B, N, D)
                left.append(x[stay:])  # (B - stay, N, D)
                x = x[:stay]  # from here on B is smaller
            if block is not None:
                vectors = modulations.take(start, start + _VECTORS, x.shape[0])  # 6 of (B, D)
                x, pending = block(x, pending, vectors)  # (B, N, D)
                start += _VECTORS
            else:
                x, pending = ops.add(x, pending), None  # (B, N, D)
                own = fused.backbone.blocks[number]
                rows = {name: _rows(tensors[name], x.shape[0]) for name in ("timestep", "labels")}
                x = own(x, timestep=rows["timestep"], class_labels=rows["labels"])  # (B, N, D)
        x = ops.add(x, pending)  # (B, N, D)
        if left:
            x = torch.cat([x, *reversed(left)])  # the whole batch in its order
        shift, scale = modulations.take(0, _LAST, x.shape[0])  # (B, D) or (1, D) each
        last = model.proj_out_2
        return ops.exit_head(
            x, shift, scale, last.weight, last.bias, grid, model.patch_size, model.norm_out.eps
        )  # (B, C or 2C, H, H)


def _rows(values: Tensor, count: int) -> Tensor:
    return values if len(values) == 1 else values[:count]
