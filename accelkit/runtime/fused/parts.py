"""Attention and MLP of diffusers' transformers in fused form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from accelkit.runtime.fused import ops
from accelkit.runtime.fused.odd import mismatch

Join = Callable[[Sequence[Tensor]], Tensor]

_PLAIN = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross")


@dataclass(frozen=True)
class SelfAttention:
    """Queries, keys and values of the tokens in one product: (B, N, D) to (B, N, D)."""

    weight: Tensor  # (3 D, D)
    bias: Tensor | None
    out: nn.Linear
    heads: int

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention of all tokens to each other."""
        qkv = F.linear(x, self.weight, self.bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D / H) each
        return _attended(q, k, v, mask, self.out)


@dataclass(frozen=True)
class CrossAttention:
    """Keys and values of another sequence in one product: (B, N, D) and (B, L, E) to (B, N, D)."""

    query: nn.Linear
    weight: Tensor  # (2 D, E)
    bias: Tensor | None
    out: nn.Linear
    heads: int

    def __call__(self, x: Tensor, others: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention of the tokens to the other sequence."""
        q = F.linear(x, self.query.weight, self.query.bias)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D / H)
        kv = F.linear(others, self.weight, self.bias).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, L, D / H) each
        return _attended(q, k, v, mask, self.out)


@dataclass(frozen=True)
class MLP:
    """Two linear layers around the tanh approximation of GELU: (B, N, D) to (B, N, D)."""

    first: nn.Linear
    second: nn.Linear

    def __call__(self, x: Tensor) -> Tensor:
        """Return the transformed tokens."""
        y = ops.linear_gelu_tanh(x, self.first.weight, self.first.bias)  # (B, N, hidden)
        return F.linear(y, self.second.weight, self.second.bias)


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: nn.Linear) -> Tensor:
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, N, D / H)
    return F.linear(x.transpose(1, 2).flatten(2), out.weight, out.bias)  # (B, N, D)


def odd_attention(attention: Any) -> str | None:
    """Return what of an attention module of diffusers its fused forms lack, or None."""
    if reason := mismatch({"its attention": (attention, Attention)}):
        return reason
    linears = {"to_q": attention.to_q, "to_k": attention.to_k, "to_v": attention.to_v}
    expected: dict[str, tuple[Any, type | None]] = {
        "its attention processor": (attention.processor, AttnProcessor2_0),
        **{f"its attention's {name}": (part, nn.Linear) for name, part in linears.items()},
        "its attention's to_out": (attention.to_out[0], nn.Linear),
        **{f"its attention's {name}": (getattr(attention, name), None) for name in _PLAIN},
    }
    if reason := mismatch(expected):
        return reason
    if attention.residual_connection or attention.rescale_output_factor != 1:
        return "its attention adds its input, or rescales its output"
    return None


def odd_mlp(mlp: Any) -> str | None:
    """Return what of a feed-forward module of diffusers its fused form lacks, or None."""
    if reason := mismatch({"its feed-forward": (mlp, FeedForward)}):
        return reason
    first, _, second = list(mlp.net)[:3]
    if reason := mismatch({"its activation": (first, GELU)}):
        return reason
    if first.approximate != "tanh" or len(mlp.net) != 3:
        return "its feed-forward is not two linear layers around the tanh form of GELU"
    return mismatch({"its first layer": (first.proj, nn.Linear), "its second": (second, nn.Linear)})


def joined_weights(attention: Any) -> list[Tensor]:
    """Return the weights of an attention module that are joined."""
    return [
        p
        for linear in (attention.to_q, attention.to_k, attention.to_v)
        for p in linear.parameters()
    ]


def self_attention(attention: Any, join: Join) -> SelfAttention:
    """Return the fused form of an attention module without :func:`odd_attention`."""
    weight, bias = _joined([attention.to_q, attention.to_k, attention.to_v], join)
    return SelfAttention(weight, bias, attention.to_out[0], attention.heads)


def cross_attention(attention: Any, join: Join) -> CrossAttention:
    """Return the fused form of an attention module without :func:`odd_attention`."""
    weight, bias = _joined([attention.to_k, attention.to_v], join)
    return CrossAttention(attention.to_q, weight, bias, attention.to_out[0], attention.heads)


def mlp(module: Any) -> MLP:
    """Return the fused form of a feed-forward module without :func:`odd_mlp`."""
    return MLP(module.net[0].proj, module.net[2])


def _joined(linears: Sequence[Any], join: Join) -> tuple[Tensor, Tensor | None]:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    weight = join([linear.weight for linear in linears])
    return weight, join(biases) if biases else None
