"""U-ViT checkpoints in the released layout, which accelkit's model keeps name for name.

The weights do not show the number of heads, the scale and offset of the timestep, and whether there
is a null class; these are taken from the published configuration of the same sizes
(Bao et al. 2023, https://arxiv.org/abs/2209.12152, released configurations).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accelkit.errors import AccelkitError
from accelkit.layouts.checkpoint import Original, State, materialize, nearest

if TYPE_CHECKING:
    from accelkit.models.uvit import UViTTransformer2DModel

KIND = "UViTTransformer2DModel"
MARK = re.compile(r"out_blocks\.\d{1,3}\.skip_linear\.weight")

_BLOCK = re.compile(r"(?:in|out)_blocks\.(\d{1,3})\..*")


def read(
    path: str | Path,
    state: State,
    num_heads: int | None,
    config: dict[str, Any],
    arguments: dict[str, Any],
) -> UViTTransformer2DModel:
    """Return the model of a state dict in the released layout.

    The file does not determine these arguments of :class:`accelkit.models.UViTTransformer2DModel`:
    ``timestep_scale``, ``timestep_offset`` and ``null_class``. If not given, they are those of the
    published configuration of the same sizes; without one, those of the nearest, with the last
    class as the null class. ``arguments`` of the training are not used.
    """
    from accelkit.models.uvit import PUBLISHED, UViTTransformer2DModel

    parts = _parts(path, state)
    with torch.device("meta"):
        names = list(UViTTransformer2DModel(1, 1, 1, attention_head_dim=2, **parts).state_dict())
    file = Original(path, state, "U-ViT", _nearest(state))
    file.check_names(names)
    sizes = parts | _sizes(file, num_heads, parts)
    file.check_settings(UViTTransformer2DModel, sizes, config)

    known = PUBLISHED[file.nearest]
    same = all(known.get(name, value) == value for name, value in sizes.items())
    rows = sizes["num_classes"]
    guess = {name: known[name] for name in ("timestep_scale", "timestep_offset")}
    guess["null_class"] = known["null_class"] if same or rows is None else rows - 1
    # On the meta device nothing is allocated or initialised before the shapes are known to fit.
    with torch.device("meta"):
        model = UViTTransformer2DModel(**guess | config | sizes)
    file.check_shapes({key: value.shape for key, value in model.state_dict().items()})
    materialize(model, state)
    model.load_state_dict(state)
    return model.eval()


def to_original(model: UViTTransformer2DModel, allow_inexact: bool = False) -> State:
    """Return the weights of a U-ViT in the released layout, detached; always exact."""
    return {key: value.detach().contiguous() for key, value in model.state_dict().items()}


def _parts(path: str | Path, state: State) -> dict[str, Any]:
    """Return the constructor's arguments that determine which weights there are."""
    if not any(map(MARK.fullmatch, state)):
        raise AccelkitError(f"{path} is no U-ViT: it has no out_blocks.N.skip_linear.weight")
    if any(key.startswith("context_embed.") for key in state):
        raise AccelkitError(f"{path} is a U-ViT for text to image, which accelkit has no model for")
    labels = state.get("label_emb.weight")
    return {
        "num_layers": _depth(state),
        "qkv_bias": any(key.endswith(".attn.qkv.bias") for key in state),
        "mlp_time_embed": any(key.startswith("time_embed.") for key in state),
        "num_classes": None if labels is None else labels.shape[:1].numel(),
        "conv": any(key.startswith("final_layer.") for key in state),
    }


def _sizes(file: Original, num_heads: int | None, parts: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments that the shapes determine."""
    from accelkit.models.uvit import PUBLISHED

    width, channels, patch, _ = file.shape("patch_embed.proj.weight", "D", "C", "p", "p")
    _, tokens, _ = file.shape("pos_embed", "1", "tokens", "D")
    hidden, _ = file.shape("mid_block.mlp.fc1.weight", "hidden", "D")
    extras = 1 if parts["num_classes"] is None else 2
    side = math.isqrt(max(1, tokens - extras))
    if side**2 != tokens - extras:
        raise AccelkitError(
            f"{file.path}: pos_embed has {tokens} tokens, which is no square of patches and "
            f"{extras} for time{' and label' if extras == 2 else ''}"
        )
    heads = {
        c["num_attention_heads"] * c["attention_head_dim"]: c["num_attention_heads"]
        for c in PUBLISHED.values()
    }
    num_heads = file.heads(width, num_heads, heads)
    return {
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "mlp_ratio": hidden / width,
    }


def _nearest(state: State) -> str:
    """Return the published configuration whose sizes are nearest to those that the file shows."""
    from accelkit.models.uvit import PUBLISHED

    def shape(key: str, axes: int) -> tuple[int, ...]:
        found = tuple(state[key].shape) if key in state else ()
        return found if len(found) == axes else (0,) * axes

    width, channels, patch, _ = shape("patch_embed.proj.weight", 4)
    ours = (_depth(state), width, channels, patch, shape("pos_embed", 3)[1])

    published = {
        name: (
            c["num_layers"],
            c["num_attention_heads"] * c["attention_head_dim"],
            c["in_channels"],
            c["patch_size"],
            (c["sample_size"] // c["patch_size"]) ** 2 + (2 if c["num_classes"] else 1),
        )
        for name, c in PUBLISHED.items()
    }
    return nearest(published, ours)


def _depth(state: State) -> int:
    """Return the number of encoder and decoder blocks, from the highest block number.

    A number far above the count of blocks belongs to a stray weight.
    """
    numbers = {int(match[1]) for key in state if (match := _BLOCK.fullmatch(key))}
    return 2 * (max((n for n in numbers if n < 2 * len(numbers)), default=0) + 1)
