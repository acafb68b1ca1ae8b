"""U-ViT checkpoints in the released layout, which accelkit's model keeps name for name.

What the weights do not show is taken from the published configuration of their sizes: the heads,
which number the network was told for the time, and whether a label stands for none
(Bao et al. 2023, https://arxiv.org/abs/2209.12152, released configurations).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accelkit.errors import AccelkitError
from accelkit.layouts.checkpoint import (
    State,
    check_floating,
    head_count,
    materialize,
    settle,
    shape_of,
    some,
)

if TYPE_CHECKING:
    from accelkit.models.uvit import UViTTransformer2DModel

MARK = re.compile(r"out_blocks\.\d{1,3}\.skip_linear\.weight")

_BLOCK = re.compile(r"(?:in|out)_blocks\.(\d{1,3})\..*")


def read(
    path: str | Path, state: State, num_heads: int | None, config: dict[str, Any]
) -> UViTTransformer2DModel:
    """Return the model of a state dict in the released layout.

    Arguments of :class:`accelkit.models.UViTTransformer2DModel` that the file does not settle:
    ``timestep_scale``, ``timestep_offset`` and ``null_class``. Without them those of the published
    configuration of the same sizes are taken; where there is none, those of the nearest, and the
    last of the classes for no label.
    """
    from accelkit.models.uvit import PUBLISHED, UViTTransformer2DModel

    parts = _parts(path, state)
    with torch.device("meta"):
        names = list(UViTTransformer2DModel(1, 1, 1, attention_head_dim=2, **parts).state_dict())
    missing = [key for key in names if key not in state]
    unexpected = [key for key in state if key not in names]
    if missing or unexpected:
        raise AccelkitError(
            f"{path} is not a whole U-ViT (nearest: {_nearest(state)}); "
            f"missing: {some(missing)}; unexpected: {some(unexpected)}"
        )
    check_floating(path, state)
    sizes = parts | _sizes(path, state, num_heads, parts)
    settle(path, UViTTransformer2DModel, sizes, config)

    known = PUBLISHED[_nearest(state)]
    same = all(known.get(name, value) == value for name, value in sizes.items())
    rows = sizes["num_classes"]
    guess = {name: known[name] for name in ("timestep_scale", "timestep_offset")}
    guess["null_class"] = known["null_class"] if same or rows is None else rows - 1
    # On the meta device nothing is allocated or initialised before the shapes are known to fit.
    with torch.device("meta"):
        model = UViTTransformer2DModel(**guess | config | sizes)
    expected = {key: list(value.shape) for key, value in model.state_dict().items()}
    wrong = [
        f"{key} {list(value.shape)} (expected {expected[key]})"
        for key, value in state.items()
        if list(value.shape) != expected[key]
    ]
    if wrong:
        raise AccelkitError(
            f"{path} is not a U-ViT (nearest: {_nearest(state)}); wrong shapes: {some(wrong)}"
        )
    materialize(model, state)
    model.load_state_dict(state)
    return model.eval()


def to_original(model: UViTTransformer2DModel) -> State:
    """Return the weights of a U-ViT in the released layout, detached."""
    return {key: value.detach().contiguous() for key, value in model.state_dict().items()}


def _parts(path: str | Path, state: State) -> dict[str, Any]:
    """The constructor's arguments that decide which weights there are."""
    if not any(map(MARK.fullmatch, state)):
        raise AccelkitError(f"{path} is no U-ViT: it has no out_blocks.N.skip_linear.weight")
    if any(key.startswith("context_embed.") for key in state):
        raise AccelkitError(f"{path} is a U-ViT for text to image, of which accelkit has no model")
    labels = state.get("label_emb.weight")
    return {
        "num_layers": _depth(state),
        "qkv_bias": any(key.endswith(".attn.qkv.bias") for key in state),
        "mlp_time_embed": any(key.startswith("time_embed.") for key in state),
        "num_classes": None if labels is None else labels.shape[:1].numel(),
        "conv": any(key.startswith("final_layer.") for key in state),
    }


def _sizes(
    path: str | Path, state: State, num_heads: int | None, parts: dict[str, Any]
) -> dict[str, Any]:
    """The constructor's arguments that the shapes settle."""
    from accelkit.models.uvit import PUBLISHED

    width, channels, patch, _ = shape_of(path, state, "patch_embed.proj.weight", "D", "C", "p", "p")
    _, tokens, _ = shape_of(path, state, "pos_embed", "1", "tokens", "D")
    hidden, _ = shape_of(path, state, "mid_block.mlp.fc1.weight", "hidden", "D")
    extras = 1 if parts["num_classes"] is None else 2
    side = math.isqrt(max(1, tokens - extras))
    if side**2 != tokens - extras:
        raise AccelkitError(
            f"{path}: pos_embed has {tokens} tokens, which is no square of patches beside "
            f"{extras} for time{' and label' if extras == 2 else ''}"
        )
    heads = {
        c["num_attention_heads"] * c["attention_head_dim"]: c["num_attention_heads"]
        for c in PUBLISHED.values()
    }
    num_heads = head_count(path, "U-ViT", width, num_heads, heads.get(width))
    return {
        "sample_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "mlp_ratio": hidden / width,
    }


def _nearest(state: State) -> str:
    """The published configuration whose sizes are nearest, as far as they show."""
    from accelkit.models.uvit import PUBLISHED

    def shape(key: str, axes: int) -> tuple[int, ...]:
        found = tuple(state[key].shape) if key in state else ()
        return found if len(found) == axes else (0,) * axes

    width, channels, patch, _ = shape("patch_embed.proj.weight", 4)
    ours = (_depth(state), width, channels, patch, shape("pos_embed", 3)[1])

    def distance(name: str) -> float:
        c = PUBLISHED[name]
        theirs = (
            c["num_layers"],
            c["num_attention_heads"] * c["attention_head_dim"],
            c["in_channels"],
            c["patch_size"],
            (c["sample_size"] // c["patch_size"]) ** 2 + (2 if c["num_classes"] else 1),
        )
        pairs = zip(ours, theirs, strict=True)
        return sum(abs(math.log(max(mine, 1) / other)) for mine, other in pairs)

    return min(PUBLISHED, key=distance)


def _depth(state: State) -> int:
    """Encoder and decoder blocks, if as many of either as the last one's number says.

    A number far beyond how many there are is a stray weight's.
    """
    numbers = {int(match[1]) for key in state if (match := _BLOCK.fullmatch(key))}
    return 2 * (max((n for n in numbers if n < 2 * len(numbers)), default=0) + 1)
