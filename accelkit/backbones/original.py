"""Checkpoints in the layout of the original repositories, to and from diffusers' models.

Only names and shapes differ between the two layouts, with three exceptions for DiT:

- diffusers keeps a copy of the timestep and label embedders in every block, the original one;
- the original stores its fixed position table, diffusers recomputes it;
- two constants of the forward pass differ, so a converted model has to carry the original's: the
  timestep frequencies 10000^(-i/128) (diffusers: i/127) and the second norm's eps 1e-6 (1e-5).

The architecture is DiT's (Peebles & Xie 2023, https://arxiv.org/abs/2212.09748, Table 1).
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accelkit.errors import AccelkitError

if TYPE_CHECKING:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

__all__ = [
    "PATCH_SIZES",
    "PUBLISHED",
    "load_original",
    "numerics",
    "read_state_dict",
    "restore_numerics",
    "save_original",
    "to_original",
]

State = dict[str, Tensor]

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
_NORM_EPS = 1e-6
_FREQ_SHIFT = 0  # of the exponent's divisor, 128 - shift; diffusers' own is 1
_SHIFT_KEY = "timestep_freq_shift"  # its name in config.json

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
_BLOCK_WEIGHT = re.compile(r"blocks\.(\d{1,3})\.adaLN_modulation\.1\.weight")


def read_state_dict(path: str | Path) -> State:
    """The weights in a checkpoint file, by name, on the CPU in the dtype they were stored in.

    ``.safetensors`` files and PyTorch pickles are read, the latter with ``weights_only=True``. A
    training checkpoint is unwrapped: its ``ema`` weights if it has them, else its ``model``. (Its
    ``argparse.Namespace`` of arguments is let through: an inert bag of values.) Where the format
    allows, the tensors are mapped from the file, so leave it in place while they are in use.

    Raises:
        AccelkitError: no such file, truncated or corrupt, a pickle of more than plain data
            (unpickling it could run code), or anything but named tensors inside.
    """
    path = Path(path)
    if path.is_dir():
        raise AccelkitError(
            f"{path} is a folder; give one checkpoint file (.safetensors, .pt or .pth), or load a "
            "diffusers folder with from_pretrained"
        )
    if not path.is_file():
        raise AccelkitError(f"{path} does not exist; give a checkpoint file")
    if path.stat().st_size == 0:
        raise AccelkitError(f"{path} is empty (0 bytes); download or copy it again")
    content = _load(path)
    for key in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise AccelkitError(
            f"{path} holds a {type(content).__name__}; expected a state dict, from names to tensors"
        )
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise AccelkitError(
                f"{path} is not a state dict: {name!r} is a {type(value).__name__}; expected "
                "tensors by name, or a dict with them under 'ema' or 'model'"
            )
    if not content:
        raise AccelkitError(f"{path} holds no tensors; expected a state dict")
    return {name: value.detach() for name, value in content.items()}


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except PermissionError:
        raise AccelkitError(f"{path} cannot be opened: permission denied") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise AccelkitError(
                f"{path} is refused: it holds a {refused[1]}, not only tensors, and unpickling "
                "that could run code; if you trust it, save its state dict alone as .safetensors"
            ) from None
        raise AccelkitError(
            f"{path} cannot be read as a checkpoint: truncated, corrupt, or written by neither "
            "safetensors nor torch.save; download or copy it again"
        ) from error


def load_original(
    path: str | Path, family: str | None = None, num_heads: int | None = None, **config: Any
) -> DiTTransformer2DModel:
    """A model of diffusers with the weights of an original checkpoint, on the CPU in eval mode.

    Sizes are read off the shapes. The dtype is the file's if it has only one, else float32. The
    weights are copied: into every block those of the shared embedders, since diffusers keeps one
    copy per block and refuses to save blocks that share storage.

    Args:
        path: a checkpoint file, as for :func:`read_state_dict`.
        family: the layout, ``"dit"``; recognised from the names of the weights if not given.
        num_heads: attention heads, which no shape shows; known for the published widths.
        **config: arguments of ``DiTTransformer2DModel`` that the file does not settle:
            ``sample_size`` (side of the latents) if it holds no position table, ``dropout``,
            ``norm_eps`` (default 1e-6, the original's).

    Returns:
        A model that computes what the original does. ``timestep_freq_shift`` in its config records
        the original's timestep frequencies; after ``from_pretrained``, which ignores the entry,
        call :func:`restore_numerics`.

    Raises:
        AccelkitError: an unreadable file, an unknown family, missing, unexpected or misshapen
            weights, a position table that is not DiT's, or a setting that contradicts the file.
        TypeError: ``num_heads`` or ``sample_size`` is not an integer.
    """
    if family is not None and family not in _FAMILIES:
        raise AccelkitError(f"family={family!r} is unknown; known: {', '.join(_FAMILIES)}")
    state = read_state_dict(path)
    if family is None:
        marked = (name for name, (mark, _) in _FAMILIES.items() if any(map(mark.fullmatch, state)))
        family = next(marked, None)
    if family is None:
        raise AccelkitError(
            f"{path} has the layout of no known family ({', '.join(_FAMILIES)}); it holds "
            f"{_some(state)}; weights in diffusers' layout load with from_pretrained"
        )
    _, read = _FAMILIES[family]
    return read(path, state, num_heads, config)


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


def _read_dit(
    path: str | Path, state: State, num_heads: int | None, config: dict[str, Any]
) -> DiTTransformer2DModel:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    layout = _check_keys(path, state)
    sizes = _sizes(path, state, num_heads)
    known = set(inspect.signature(DiTTransformer2DModel.__init__).parameters) - {"self"}
    for name, value in config.items():
        if name not in known:
            raise AccelkitError(f"{name}={value!r} is unknown; known: {', '.join(sorted(known))}")
        if name in sizes and value != sizes[name]:
            raise AccelkitError(f"{name}={value!r} contradicts {path}: it has {sizes[name]!r}")
    config = {"norm_eps": _NORM_EPS} | config | sizes
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, sample = config["patch_size"], config.get("sample_size")
    if sample is None:
        raise AccelkitError(f"{path} holds no pos_embed; give sample_size, the latents' side")
    _check_count("sample_size", sample)
    if sample % patch:
        raise AccelkitError(f"sample_size={sample} is not a multiple of the patch size {patch}")

    # On the meta device nothing is allocated or initialised before the shapes are known to fit.
    with torch.device("meta"):
        model = DiTTransformer2DModel(**config)
    table = _position_table(sample, patch, width)
    _check_shapes(path, state, layout, model.state_dict(), table)
    dtypes = {value.dtype for value in state.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    nn.Module.to(model, dtype).to_empty(device="cpu")  # diffusers' own .to warns of any half dtype
    model.pos_embed.pos_embed = table
    weights: State = {}
    for key, targets in layout.items():
        rows = state[key].chunk(3) if ".qkv." in key else [state[key]] * len(targets)
        weights.update(zip(targets, rows, strict=True))
    model.load_state_dict(weights)
    model.register_to_config(**{_SHIFT_KEY: _FREQ_SHIFT})
    restore_numerics(model)
    return model.eval()


def _check_keys(path: str | Path, state: State) -> dict[str, list[str]]:
    numbers = [int(match[1]) for key in state if (match := _BLOCK_WEIGHT.fullmatch(key))]
    if not numbers:
        raise AccelkitError(f"{path} is no original DiT: it has no blocks.N.adaLN_modulation")
    layout = _layout(max(numbers) + 1)
    missing = [key for key in layout if key not in state]
    unexpected = [key for key in state if key not in layout and key != "pos_embed"]
    if missing or unexpected:
        raise AccelkitError(
            f"{path} is not a whole DiT (nearest: {_nearest(state)}); "
            f"missing: {_some(missing)}; unexpected: {_some(unexpected)}"
        )
    for key, value in state.items():
        if not value.is_floating_point():
            raise AccelkitError(f"{path}: {key} is {value.dtype}; expected floating point weights")
    return layout


def _sizes(path: str | Path, state: State, num_heads: int | None) -> dict[str, Any]:
    """The constructor's arguments that the file settles."""

    def shape(key: str, *axes: str) -> list[int]:
        found = list(state[key].shape)
        if len(found) != len(axes) or 0 in found:
            raise AccelkitError(f"{path}: {key} has shape {found}; expected ({', '.join(axes)})")
        return found

    width, channels, patch, _ = shape("x_embedder.proj.weight", "D", "C", "p", "p")
    features, _ = shape("final_layer.linear.weight", "p*p*C_out", "D")
    rows, _ = shape("y_embedder.embedding_table.weight", "classes + 1", "D")
    if width % 4:
        raise AccelkitError(f"{path} has width {width}; DiT's position table needs a multiple of 4")
    if num_heads is None:
        num_heads = next((heads for _, known, heads in PUBLISHED.values() if known == width), None)
        if num_heads is None:
            raise AccelkitError(
                f"{path} has width {width}, which no published DiT has; give num_heads, which no "
                "shape shows"
            )
    _check_count("num_heads", num_heads)
    if width % num_heads:
        raise AccelkitError(f"num_heads={num_heads} does not divide the width {width} of {path}")
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
            f"{path} is not a DiT (nearest: {_nearest(state)}); wrong shapes: {_some(wrong)}"
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


def restore_numerics(model: DiTTransformer2DModel) -> None:
    """Apply the timestep frequencies that the model's config records; without a record, nothing.

    ``from_pretrained`` keeps the entry that :func:`load_original` left in ``config.json`` (and
    warns that it is ignored) but builds diffusers' own frequencies. Safe to call repeatedly.

    Raises:
        AccelkitError: the recorded ``timestep_freq_shift`` is neither 0 nor 1.
    """
    shift = model.config.get(_SHIFT_KEY)
    if shift is None:
        return
    if shift not in (0, 1):
        raise AccelkitError(f"{_SHIFT_KEY}={shift!r} in the config; expected 0 (original) or 1")
    for block in _blocks(model):
        block.norm1.emb.time_proj.downscale_freq_shift = shift


def numerics(model: DiTTransformer2DModel) -> dict[str, str | float]:
    """The constants on which the original and diffusers differ, as the modules have them.

    Returns:
        ``timestep_frequencies``: ``"original"`` (10000^(-i/128)), ``"diffusers"``
        (10000^(-i/127)), ``"other"``, or ``"mixed"`` if blocks differ. ``norm_eps``: eps of the
        norm before the MLP (original 1e-6), or ``"mixed"``.
    """
    shifts = {block.norm1.emb.time_proj.downscale_freq_shift for block in _blocks(model)}
    epsilons = {block.norm3.eps for block in _blocks(model)}
    names = {_FREQ_SHIFT: "original", 1: "diffusers"}
    return {
        "timestep_frequencies": names.get(shifts.pop(), "other") if len(shifts) == 1 else "mixed",
        "norm_eps": epsilons.pop() if len(epsilons) == 1 else "mixed",
    }


def to_original(model: DiTTransformer2DModel, allow_inexact: bool = False) -> State:
    """The weights of a diffusers DiT in the original layout, the inverse of :func:`load_original`.

    Args:
        model: any ``DiTTransformer2DModel`` with the original's architecture.
        allow_inexact: convert even if the original code would compute something slightly else.

    Returns:
        Detached tensors by original key, on the model's device and in its dtype.

    Raises:
        AccelkitError: the architecture has no original layout; the embedder copies of two blocks
            differ; or the numerics are not the original's (and ``allow_inexact`` is false).
        TypeError: ``model`` is not a ``DiTTransformer2DModel``.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    if not isinstance(model, DiTTransformer2DModel):
        raise TypeError(f"expected a DiTTransformer2DModel, got {type(model).__name__}")
    for name, value in _FIXED.items():
        if model.config[name] != value:
            raise AccelkitError(
                f"the model has {name}={model.config[name]!r}, which the original layout cannot "
                f"express; it means {value!r}"
            )
    found = numerics(model)
    wanted = {"timestep_frequencies": "original", "norm_eps": _NORM_EPS}
    if found != wanted and not allow_inexact:
        raise AccelkitError(
            f"the model computes with {found}, original code with {wanted}, so the weights would "
            "give other outputs there; pass allow_inexact=True to convert them all the same"
        )
    weights = model.state_dict()
    state: State = {}
    for key, targets in _layout(len(_blocks(model))).items():
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


def save_original(
    model: DiTTransformer2DModel, path: str | Path, allow_inexact: bool = False
) -> None:
    """Write :func:`to_original` to a ``.safetensors`` or ``.pt`` file, whole or not at all.

    Raises:
        AccelkitError: another suffix, no such folder, or a model that cannot be converted.
        TypeError: ``model`` is not a ``DiTTransformer2DModel``.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise AccelkitError(f"{path} has suffix {path.suffix!r}; give .safetensors or .pt")
    if not path.parent.is_dir():
        raise AccelkitError(f"{path.parent} is not a folder; create it first")
    state = to_original(model, allow_inexact)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".safetensors":
            save_file(state, part)
        else:
            torch.save(state, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _blocks(model: DiTTransformer2DModel) -> list[Any]:
    return list(model.transformer_blocks)  # Any: their submodules are known by name only


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise AccelkitError(f"{name}={value}; expected at least 1")


def _some(names: Iterable[str], limit: int = 10) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + rest


def _block_weights(state: State) -> list[Tensor]:
    return [value for key, value in state.items() if _BLOCK_WEIGHT.fullmatch(key)]


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


# Family -> a key that only its layout has, and its reader.
_FAMILIES = {"dit": (_BLOCK_WEIGHT, _read_dit)}
