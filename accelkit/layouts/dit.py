"""DiT checkpoints in the layout of the original repository, to and from diffusers' model.

Only names and shapes differ between the two layouts, with three exceptions:

- diffusers keeps a copy of the timestep and label embedders in every block, the original one;
- the original stores its fixed position table, diffusers recomputes it;
- two constants of the forward pass differ, so a converted model has to carry the original's: the
  timestep frequencies 10000^(-i/128) (diffusers: i/127) and the second norm's eps 1e-6 (1e-5).

The architecture is DiT's (Peebles & Xie 2023, https://arxiv.org/abs/2212.09748, Table 1).
"""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelkit.backbones.dit import (
    FREQ_SHIFT,
    NORM_EPS,
    NULL_KEY,
    SHIFT_KEY,
    numerics,
    restore_numerics,
)
from accelkit.errors import AccelkitError
from accelkit.layouts.checkpoint import (
    State,
    check_count,
    check_floating,
    head_count,
    materialize,
    settle,
    shape_of,
    some,
)

if TYPE_CHECKING:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

#: The published sizes, DiT Table 1: blocks, width, attention heads. Each comes in every patch size.
PUBLISHED = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)

# What diffusers' constructor can vary and the original layout cannot express.
_FIXED: dict[str, Any] = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}

# original module -> diffusers module
_SHARED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK = {
    "adaLN_modulation.1": ["norm1.linear"],
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}
_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
MARK = re.compile(r"blocks\.(\d{1,3})\.adaLN_modulation\.1\.weight")


def _layout(depth: int) -> dict[str, list[str]]:
    """Original key -> diffusers keys: one, one a block (shared), or three (rows of q, k, v)."""

    def named(target: str, i: int) -> str:
        return f"transformer_blocks.{i}.{target}"

    modules = {source: [target] for source, target in _ENDS.items()}
    for source, target in _SHARED.items():
        modules[source] = [named(target, i) for i in range(depth)]
    for i in range(depth):
        for source, targets in _BLOCK.items():
            modules[f"blocks.{i}.{source}"] = [named(target, i) for target in targets]
    return {
        f"{source}.{kind}": [f"{target}.{kind}" for target in targets]
        for source, targets in modules.items()
        for kind in ("weight", "bias")
        if (source, kind) != ("y_embedder.embedding_table", "bias")
    }


def read(
    path: str | Path,
    state: State,
    num_heads: int | None,
    config: dict[str, Any],
    arguments: dict[str, Any],
) -> DiTTransformer2DModel:
    """Return the model of a state dict in the original layout.

    Arguments of ``DiTTransformer2DModel`` that the file does not settle: ``sample_size`` (side of
    the latents) if it holds no position table, ``dropout``, ``norm_eps`` (default 1e-6, the
    original's). ``timestep_freq_shift`` in the model's config records the original's timestep
    frequencies; after ``from_pretrained``, which ignores the entry, call :func:`restore_numerics`.

    ``null_class=None`` says that the label table has no row for no label, its last row being a
    class like the others: a network trained without label dropout. A training checkpoint shows it
    by as many classes (``num_classes`` of its ``args``) as the table has rows; else the last row is
    taken for the null class, as the original's is.

    The weights are copied: into every block those of the shared embedders, since diffusers keeps
    one copy per block and refuses to save blocks that share storage.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    layout = _check_keys(path, state)
    sizes = _sizes(path, state, num_heads)
    null, config = _null_class(path, sizes["num_embeds_ada_norm"], config, arguments)
    settle(path, DiTTransformer2DModel, sizes, config)
    config = {"norm_eps": NORM_EPS} | config | sizes
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, sample = config["patch_size"], config.get("sample_size")
    if sample is None:
        raise AccelkitError(f"{path} holds no pos_embed; give sample_size, the latents' side")
    check_count("sample_size", sample)
    if sample % patch:
        raise AccelkitError(f"sample_size={sample} is not a multiple of the patch size {patch}")

    # On the meta device nothing is allocated or initialised before the shapes are known to fit.
    with torch.device("meta"):
        model = DiTTransformer2DModel(**config)
    table = _position_table(sample, patch, width)
    _check_shapes(path, state, layout, model.state_dict(), table)
    materialize(model, state)
    model.pos_embed.pos_embed = table
    weights: State = {}
    for key, targets in layout.items():
        rows = state[key].chunk(3) if ".qkv." in key else [state[key]] * len(targets)
        weights.update(zip(targets, rows, strict=True))
    model.load_state_dict(weights)
    model.register_to_config(**{SHIFT_KEY: FREQ_SHIFT})
    if null is None:
        model.register_to_config(**{NULL_KEY: None})
    restore_numerics(model)
    return model.eval()


def _null_class(
    path: str | Path, last: int, config: dict[str, Any], arguments: dict[str, Any]
) -> tuple[int | None, dict[str, Any]]:
    """Return the label that stands for none, and the settings without it.

    Args:
        path: the file.
        last: row of the label table.
        config: settings given by the user.
        arguments: of the training.
    """
    shown = None if arguments.get("num_classes") == last + 1 else last
    null = config.get(NULL_KEY, shown)
    if null not in (last, None):
        raise AccelkitError(
            f"{NULL_KEY}={null!r} contradicts {path}: it is the label table's last row, {last}, or "
            "None for a network trained without label dropout"
        )
    return null, {name: value for name, value in config.items() if name != NULL_KEY}


def _check_keys(path: str | Path, state: State) -> dict[str, list[str]]:
    numbers = [int(match[1]) for key in state if (match := MARK.fullmatch(key))]
    if not numbers:
        raise AccelkitError(f"{path} is no original DiT: it has no blocks.N.adaLN_modulation")
    layout = _layout(max(numbers) + 1)
    missing = [key for key in layout if key not in state]
    unexpected = [key for key in state if key not in layout and key != "pos_embed"]
    if missing or unexpected:
        raise AccelkitError(
            f"{path} is not a whole DiT (nearest: {_nearest(state)}); "
            f"missing: {some(missing)}; unexpected: {some(unexpected)}"
        )
    check_floating(path, state)
    return layout


def _sizes(path: str | Path, state: State, num_heads: int | None) -> dict[str, Any]:
    """The constructor's arguments that the file settles."""

    def shape(key: str, *axes: str) -> list[int]:
        return shape_of(path, state, key, *axes)

    width, channels, patch, _ = shape("x_embedder.proj.weight", "D", "C", "p", "p")
    features, _ = shape("final_layer.linear.weight", "p*p*C_out", "D")
    rows, _ = shape("y_embedder.embedding_table.weight", "classes + 1", "D")
    if width % 4:
        raise AccelkitError(f"{path} has width {width}; DiT's position table needs a multiple of 4")
    known = next((heads for _, wide, heads in PUBLISHED.values() if wide == width), None)
    num_heads = head_count(path, "DiT", width, num_heads, known)
    sizes = {
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "in_channels": channels,
        "out_channels": features // patch**2,
        "num_layers": len(_block_weights(state)),
        "patch_size": patch,
        "num_embeds_ada_norm": rows - 1,  # the last row is the null class
    }
    if "pos_embed" in state:
        _, tokens, _ = shape("pos_embed", "1", "tokens", "D")
        sizes["sample_size"] = math.isqrt(tokens) * patch
    return sizes | _FIXED


def _check_shapes(
    path: str | Path, state: State, layout: dict[str, list[str]], model: State, table: Tensor
) -> None:
    """The file's shapes against the (meta) model's, and its position table against DiT's."""
    expected = {key: list(model[targets[0]].shape) for key, targets in layout.items()}
    for key in expected:
        if ".qkv." in key:
            expected[key][0] *= 3
    expected["pos_embed"] = list(table.shape)
    wrong = [
        f"{key} {list(value.shape)} (expected {expected[key]})"
        for key, value in state.items()
        if list(value.shape) != expected[key]
    ]
    if wrong:
        raise AccelkitError(
            f"{path} is not a DiT (nearest: {_nearest(state)}); wrong shapes: {some(wrong)}"
        )
    if (stored := state.get("pos_embed")) is not None:
        rounding = max(1e-4, torch.finfo(stored.dtype).eps)
        if not torch.allclose(stored.float(), table, rtol=0, atol=rounding):
            raise AccelkitError(
                f"{path}: pos_embed is not DiT's sine-cosine table, which diffusers' model "
                "recomputes, so a trained table would be lost"
            )


def _position_table(sample_size: int, patch: int, width: int) -> Tensor:
    """The fixed sine-cosine table as diffusers computes it, (1, tokens, width), float32."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    grid = sample_size // patch
    return get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt").float()[None]


def to_original(model: DiTTransformer2DModel, allow_inexact: bool = False) -> State:
    """The weights of a diffusers DiT in the original layout, the inverse of :func:`read`.

    Args:
        model: any ``DiTTransformer2DModel`` with the original's architecture.
        allow_inexact: convert even if the original code would compute something slightly else.

    Returns:
        Detached tensors by original key, on the model's device and in its dtype.

    Raises:
        AccelkitError: the architecture has no original layout; the embedder copies of two blocks
            differ; or the numerics are not the original's (and ``allow_inexact`` is false).
    """
    for name, value in _FIXED.items():
        if model.config[name] != value:
            raise AccelkitError(
                f"the model has {name}={model.config[name]!r}, which the original layout cannot "
                f"express; it means {value!r}"
            )
    found = numerics(model)
    wanted = {"timestep_frequencies": "original", "norm_eps": NORM_EPS}
    if found != wanted and not allow_inexact:
        raise AccelkitError(
            f"the model computes with {found}, original code with {wanted}, so the weights would "
            "give other outputs there; convert them all the same with --allow-inexact "
            "(allow_inexact=True)"
        )
    weights = model.state_dict()
    state: State = {}
    for key, targets in _layout(len(model.transformer_blocks)).items():
        parts = [weights[target].detach() for target in targets]
        if ".qkv." in key:
            parts = [torch.cat(parts)]
        for i, part in enumerate(parts):
            if not torch.equal(part, parts[0]):
                raise AccelkitError(
                    f"{key} is shared by all blocks in the original, but block {i}'s copy differs "
                    "from block 0's; a model fine-tuned with separate copies cannot be converted"
                )
        state[key] = parts[0].contiguous()
    patch = state["x_embedder.proj.weight"]
    table = _position_table(model.config.sample_size, model.config.patch_size, len(patch))
    state["pos_embed"] = table.to(patch)
    return state


def _block_weights(state: State) -> list[Tensor]:
    return [value for key, value in state.items() if MARK.fullmatch(key)]


def _nearest(state: State) -> str:
    """The published configuration nearest in depth, width and (where it shows) patch size."""
    blocks = _block_weights(state)
    depth, width = len(blocks), blocks[0].shape[-1:].numel()
    conv = state.get("x_embedder.proj.weight")
    patch = conv.shape[-1] if conv is not None and conv.ndim == 4 else PATCH_SIZES[0]

    def distance(candidate: tuple[str, int]) -> float:
        size, p = candidate
        pairs = zip((depth, width, patch), (*PUBLISHED[size][:2], p), strict=True)
        return sum(abs(math.log(max(ours, 1) / theirs)) for ours, theirs in pairs)

    size, p = min(product(PUBLISHED, PATCH_SIZES), key=distance)
    return f"DiT-{size}/{p}"
