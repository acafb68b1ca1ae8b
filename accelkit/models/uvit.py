"""U-ViT: a vision transformer with the long skips of a U-Net (Bao et al. 2023).

"All are Worth Words: A ViT Backbone for Diffusion Models", https://arxiv.org/abs/2209.12152. Time
and label are tokens next to the patches, so a block takes tokens only. The first half of the blocks
passes its outputs to the second half by long skips, the last one first. Modules and weights are
named as in the released checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from accelkit.errors import AccelkitError

# The timestep that the network is given, from the index 0..999 of the linear-beta process: networks
# of the continuous process were trained with 999 t, where index i is t = (i + 1) / 1000; those of
# the discrete one with steps counted from 1.
_CONTINUOUS = {"timestep_scale": 0.999, "timestep_offset": 0.999}
_DISCRETE = {"timestep_scale": 1.0, "timestep_offset": 1.0}

_COLUMNS = (
    "sample_size",
    "patch_size",
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "num_classes",
    "null_class",
    "conv",
)
_ROWS: dict[str, tuple[tuple[Any, ...], dict[str, float]]] = {
    "cifar10-s2": ((32, 2, 3, 12, 8, 64, None, None, True), _CONTINUOUS),
    "celeba64-s4": ((64, 4, 3, 12, 8, 64, None, None, True), _CONTINUOUS),
    "imagenet64-m4": ((64, 4, 3, 16, 12, 64, 1000, None, True), _CONTINUOUS),
    "imagenet64-l4": ((64, 4, 3, 20, 16, 64, 1000, None, True), _CONTINUOUS),
    "imagenet256-l2": ((32, 2, 4, 20, 16, 64, 1001, 1000, True), _CONTINUOUS),
    "imagenet256-h2": ((32, 2, 4, 28, 16, 72, 1001, 1000, False), _DISCRETE),
    "imagenet512-l4": ((64, 4, 4, 20, 16, 64, 1001, 1000, True), _CONTINUOUS),
    "imagenet512-h4": ((64, 4, 4, 28, 16, 72, 1001, 1000, False), _DISCRETE),
}

PUBLISHED: dict[str, dict[str, Any]] = {
    name: dict(zip(_COLUMNS, row, strict=True)) | process for name, (row, process) in _ROWS.items()
}
"""The released models of Bao et al. 2023 without text, by data set, size and patch: arguments of
:class:`UViTTransformer2DModel`. ImageNet at 256 and 512 pixels is modelled in the latents of Stable
Diffusion's autoencoder."""


class UViTAttention(nn.Module):
    """Multi-head self-attention: (B, N, D) to (B, N, D)."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the attention's output for every token."""
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D / H) each
        gathered = F.scaled_dot_product_attention(q, k, v)
        return self.proj(gathered.transpose(1, 2).reshape(batch, tokens, width))


class UViTMLP(nn.Module):
    """Two linear layers around the exact GELU: (B, N, D) to (B, N, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return every token transformed by itself."""
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class UViTBlock(nn.Module):
    """A pre-norm transformer block, in the decoder with a long skip joined to its input."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = UViTAttention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = UViTMLP(width, round(width * mlp_ratio))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def join(self, hidden_states: Tensor, skip: Tensor) -> Tensor:
        """Return the input of a decoder block (B, N, D), which a skipped block still computes."""
        assert self.skip_linear is not None
        return self.skip_linear(torch.cat([hidden_states, skip], dim=-1))

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        """Return the tokens (B, N, D); a decoder block joins ``skip`` (B, N, D) to its input."""
        if skip is not None:
            hidden_states = self.join(hidden_states, skip)
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class UViTPatches(nn.Module):
    """Non-overlapping patches, in rows: (B, C, S, S) to (B, N, D)."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, sample: Tensor) -> Tensor:
        """Return a token for each patch."""
        return self.proj(sample).flatten(2).transpose(1, 2)


class UViTTransformer2DModel(ModelMixin, ConfigMixin):
    """U-ViT, unconditional or class-conditional, which predicts the noise.

    Args:
        sample_size: side of the pixels or latents.
        patch_size: side of a patch.
        in_channels: channels of the sample and of the prediction.
        num_layers: number of blocks without the middle one, half encoder and half decoder.
        num_attention_heads, attention_head_dim: their product is the width.
        mlp_ratio: hidden width of the MLPs over the width.
        qkv_bias: whether queries, keys and values have a bias.
        mlp_time_embed: whether an MLP follows the sinusoids of the timestep.
        num_classes: rows of the label table, including one for the null class if there is one;
            None without labels.
        null_class: the row of the null class, the last; None if labels were never dropped.
        conv: whether a 3 x 3 convolution ends the network.
        timestep_scale, timestep_offset: the timestep that the network is given is
            ``scale * index + offset`` (:meth:`timestep_of`) for a scheduler's index 0..999. The
            forward pass does not use them.

    Raises:
        AccelkitError: the number of blocks is odd, or sizes do not fit together.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]  # noqa: RUF012 - diffusers' own
    _no_split_modules = ["UViTBlock"]  # noqa: RUF012
    _repeated_blocks = ["UViTBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        num_layers: int = 12,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int | None = None,
        null_class: int | None = None,
        conv: bool = True,
        timestep_scale: float = 1.0,
        timestep_offset: float = 0.0,
    ) -> None:
        super().__init__()
        least = min(sample_size, patch_size, in_channels, num_attention_heads, attention_head_dim)
        if least < 1 or (num_classes is not None and num_classes < 1):
            raise AccelkitError(
                "a U-ViT has at least one pixel, channel, head and, if any, class; its config says "
                f"{least if num_classes is None else min(least, num_classes)}"
            )
        width = num_attention_heads * attention_head_dim
        _check(sample_size, patch_size, num_layers, width, num_classes, null_class)
        self.out_channels = in_channels
        self.gradient_checkpointing = False
        self.extras = 1 if num_classes is None else 2  # tokens before the patches
        tokens = self.extras + (sample_size // patch_size) ** 2

        def blocks(count: int, skip: bool) -> list[UViTBlock]:
            heads = num_attention_heads
            return [UViTBlock(width, heads, mlp_ratio, qkv_bias, skip) for _ in range(count)]

        self.patch_embed = UViTPatches(patch_size, in_channels, width)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if mlp_time_embed
            else nn.Identity()
        )
        self.label_emb = None if num_classes is None else nn.Embedding(num_classes, width)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.in_blocks = nn.ModuleList(blocks(num_layers // 2, skip=False))
        self.mid_block = blocks(1, skip=False)[0]
        self.out_blocks = nn.ModuleList(blocks(num_layers // 2, skip=True))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1) if conv else None
        self.initialize()

    def initialize(self) -> None:
        """Initialise the weights as published, from torch's generator.

        Linear weights and positions from N(0, 0.02^2) truncated at 2, biases 0; norms 1 and 0;
        convolutions and the label table with torch's defaults (Bao et al. 2023, released code).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d, nn.Embedding)):
                module.reset_parameters()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise in ``sample``.

        Args:
            sample: (B, C, S, S), floating.
            timestep: one number or one per sample (B,), as in training and not necessarily whole:
                999 t for a continuous process, 1..1000 for a discrete one.
            class_labels: (B,) or, for all samples, (1,), int64; None without classes.
            return_dict: False returns a tuple of one.

        Returns:
            ``.sample`` (B, C, S, S).

        Raises:
            AccelkitError: labels are given to a network without classes, or missing for one with
                classes; or the sample's size or the number of timesteps is wrong.
        """
        x = self.embed(sample, timestep, class_labels)
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        x = self.unembed(x)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def embed(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None
    ) -> Tensor:
        """Return the tokens of a call, (B, 1 or 2 + N, D): label, time, patches, with positions."""
        self._check_call(sample, class_labels)
        x = self.patch_embed(sample)  # (B, N, D)
        time = self.time_embed(self._sinusoids(timestep, x))  # (B, D)
        tokens = [time[:, None], x]
        if self.label_emb is not None:
            tokens.insert(0, self.label_emb(class_labels).expand(len(x), -1)[:, None])
        return torch.cat(tokens, dim=1) + self.pos_embed  # (B, 1 or 2 + N, D)

    def unembed(self, tokens: Tensor) -> Tensor:
        """Return the prediction (B, C, S, S) from the last block's tokens."""
        x = self.decoder_pred(self.norm(tokens))[:, self.extras :]  # (B, N, p * p * C)
        x = self._unpatchify(x)
        return x if self.final_layer is None else self.final_layer(x)

    def timestep_of(self, index: Tensor) -> Tensor:
        """Return the timestep that the network is given at a scheduler's index 0..999."""
        return self.config.timestep_scale * index + self.config.timestep_offset

    def index_of(self, timestep: float) -> float:
        """Return the scheduler's index of a timestep that the network is given."""
        return (timestep - self.config.timestep_offset) / self.config.timestep_scale

    def _run(self, block: nn.Module, *states: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *states)
        return block(*states)

    def _sinusoids(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        """Cosines, then sines, of the timestep at D / 2 frequencies, (B, D) as ``like``."""
        batch, _, width = like.shape
        time = torch.as_tensor(timestep, device=like.device).float()
        if time.ndim > 1 or time.numel() not in (1, batch):
            raise AccelkitError(
                f"got timesteps of shape {tuple(time.shape)} for a batch of {batch}; give one, or "
                "one per sample"
            )
        index = torch.arange(width // 2, device=like.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10000) * index / (width // 2))
        angles = (time[None] if time.ndim == 0 else time)[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(like.dtype).expand(batch, -1)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        patch, channels = self.config.patch_size, self.out_channels
        side = self.config.sample_size // patch
        x = tokens.view(len(tokens), side, side, patch, patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch, side * patch)

    def _check_call(self, sample: Tensor, class_labels: Tensor | None) -> None:
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if sample.ndim != 4 or tuple(sample.shape[1:]) != expected:
            raise AccelkitError(
                f"this U-ViT takes samples (B, {', '.join(map(str, expected))}), got "
                f"{tuple(sample.shape)}"
            )
        if self.label_emb is None and class_labels is not None:
            raise AccelkitError("this U-ViT has no classes; leave class_labels out")
        if self.label_emb is not None and class_labels is None:
            raise AccelkitError(
                f"this U-ViT has {self.config.num_classes} classes; give class_labels"
            )


def _check(
    sample_size: int,
    patch_size: int,
    num_layers: int,
    width: int,
    num_classes: int | None,
    null_class: int | None,
) -> None:
    if num_layers < 2 or num_layers % 2:
        raise AccelkitError(
            f"num_layers={num_layers}; a U-ViT has as many decoder blocks as encoder blocks, not "
            "counting its middle one, so give an even number, at least 2"
        )
    if sample_size % patch_size:
        raise AccelkitError(
            f"sample_size={sample_size} is not a multiple of the patch size {patch_size}"
        )
    if width % 2:
        raise AccelkitError(f"width {width} is odd; cosines and sines of the timestep halve it")
    if null_class is not None and null_class != (num_classes or 0) - 1:
        raise AccelkitError(
            f"null_class={null_class} with num_classes={num_classes}; no label is the last row"
        )
