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
    Original,
    State,
    check_count,
    materialize,
    nearest,
)

if TYPE_CHECKING:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

#: The published sizes (DiT Table 1): blocks, width, attention heads. All have every patch size.
PUBLISHED = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)

# Arguments of diffusers' constructor whose other values the original layout cannot express.
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
KIND = "DiTTransformer2DModel"
MARK = re.compile(r"blocks\.(\d{1,3})\.adaLN_modulation\.1\.weight")


def _layout(depth: int) -> dict[str, list[str]]:
    """Return original key -> diffusers keys: one, one per block (shared), or three (q, k, v)."""

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

    The file does not determine these arguments of ``DiTTransformer2DModel``: ``sample_size`` (side
    of the latents) if it has no position table, ``dropout``, and ``norm_eps`` (default 1e-6, the
    original's). ``timestep_freq_shift`` in the model's config records the original's timestep
    frequencies; after ``from_pretrained``, which ignores the entry, call :func:`restore_numerics`.

    ``null_class=None`` means that the label table has no null class, its last row being a class
    like the others: a network trained without label dropout. A training checkpoint with as many
    classes (``num_classes`` of its ``args``) as the table has rows implies it; otherwise the last
    row is the null class, as in the original.

    The weights are copied, those of the shared embedders into every block, since diffusers keeps
    one copy per block and refuses to save blocks that share storage.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    depth = max((int(m[1]) for m in map(MARK.fullmatch, state) if m), default=None)
    if depth is None:
        raise AccelkitError(f"{path} is no original DiT: it has no blocks.N.adaLN_modulation")
    layout = _layout(depth + 1)
    file = Original(path, state, "DiT", _nearest(state))
    file.check_names(layout, optional=("pos_embed",))
    sizes = _sizes(file, num_heads)
    null, config = _null_class(path, sizes["num_embeds_ada_norm"], config, arguments)
    file.check_settings(DiTTransformer2DModel, sizes, config)
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
    _check_shapes(file, layout, model.state_dict(), table)
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
    """Return the null class, and the settings without it.

    Args:
        path: the file.
        last: the last row of the label table.
        config: the user's settings.
        arguments: arguments of the training.
    """
    shown = None if arguments.get("num_classes") == last + 1 else last
    null = config.get(NULL_KEY, shown)
    if null not in (last, None):
        raise AccelkitError(
            f"{NULL_KEY}={null!r} contradicts {path}: give the label table's last row, {last}, or "
            "None for a network trained without label dropout"
        )
    return null, {name: value for name, value in config.items() if name != NULL_KEY}


def _sizes(file: Original, num_heads: int | None) -> dict[str, Any]:
    """Return the constructor's arguments that the file determines."""
    width, channels, patch, _ = file.shape("x_embedder.proj.weight", "D", "C", "p", "p")
    features, _ = file.shape("final_layer.linear.weight", "p*p*C_out", "D")
    rows, _ = file.shape("y_embedder.embedding_table.weight", "classes + 1", "D")
    if width % 4:
        raise AccelkitError(
            f"{file.path} has width {width}; DiT's position table needs a multiple of 4"
        )
    num_heads = file.heads(width, num_heads, {wide: n for _, wide, n in PUBLISHED.values()})
    sizes = {
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "in_channels": channels,
        "out_channels": features // patch**2,
        "num_layers": len(_block_weights(file.state)),
        "patch_size": patch,
        "num_embeds_ada_norm": rows - 1,  # The last row is the null class.
    }
    if "pos_embed" in file.state:
        _, tokens, _ = file.shape("pos_embed", "1", "tokens", "D")
        sizes["sample_size"] = math.isqrt(tokens) * patch
    return sizes | _FIXED


def _check_shapes(
    file: Original, layout: dict[str, list[str]], model: State, table: Tensor
) -> None:
    """Check the file's shapes against the (meta) model's, and its position table against DiT's."""
    expected = {key: list(model[targets[0]].shape) for key, targets in layout.items()}
    for key in expected:
        if ".qkv." in key:
            expected[key][0] *= 3
    file.check_shapes(expected | {"pos_embed": list(table.shape)})
    if (stored := file.state.get("pos_embed")) is not None:
        rounding = max(1e-4, torch.finfo(stored.dtype).eps)
        if not torch.allclose(stored.float(), table, rtol=0, atol=rounding):
            raise AccelkitError(
                f"{file.path}: pos_embed is not DiT's sine-cosine table, which diffusers' model "
                "recomputes, so a trained table would be lost"
            )


def _position_table(sample_size: int, patch: int, width: int) -> Tensor:
    """Return the fixed sine-cosine table as diffusers computes it, (1, tokens, width), float32."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    grid = sample_size // patch
    return get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt").float()[None]


def to_original(model: DiTTransformer2DModel, allow_inexact: bool = False) -> State:
    """Return the weights of a diffusers DiT in the original layout, the inverse of :func:`read`.

    Args:
        model: any ``DiTTransformer2DModel`` with the original's architecture.
        allow_inexact: convert even if the original code would compute slightly different outputs.

    Returns:
        Detached tensors by original key, on the model's device and in its dtype.

    Raises:
        AccelkitError: the original layout cannot express the architecture; two blocks' copies of
            the embedders differ; or the numerics are not the original's and ``allow_inexact`` is
            false.
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
            "give other outputs there; to convert them anyway, give --allow-inexact "
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
    """Return the published configuration nearest in depth, width and, if known, patch size."""
    blocks = _block_weights(state)
    depth, width = len(blocks), blocks[0].shape[-1:].numel()
    conv = state.get("x_embedder.proj.weight")
    patch = conv.shape[-1] if conv is not None and conv.ndim == 4 else PATCH_SIZES[0]
    published = {
        f"DiT-{size}/{p}": (*PUBLISHED[size][:2], p) for size, p in product(PUBLISHED, PATCH_SIZES)
    }
    return nearest(published, (depth, width, patch))
