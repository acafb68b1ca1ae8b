"""A call of a network made up from its forward's signature and its config.

For calls whose numbers nobody looks at: to count what they cost, or to see what a block is given.
They run on a twin of the network that has its config and no weights, on the meta device; a network
that reads the values of what it is given (say, the length of a text from its mask) cannot be run
there and gets a small call on a twin with arbitrary weights.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from accelkit.errors import AccelkitError

SIDE, FRAMES, TOKENS = 64, 8, 256
"""Height and width of latents, frames and text tokens where a config does not tell them."""
_TINY = {"side": 8, "frames": 4, "tokens": 6}

# The layouts that samples come in: maps, videos, frames of a video, tokens, signals.
LAYOUTS = ("BCHW", "BCFHW", "BFCHW", "BNC", "BCN")

# Where a config keeps the width of text, a width that is projected before the one it becomes.
_TEXT_WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "cross_attention_input_dim",
    "cross_attention_dim",
)
HOW = "tell it about them with accelkit.register_backbone(cls, backbone)"
"""What to do about blocks that cannot be found."""

_TEXT_LENGTHS = ("text_len", "max_text_seq_length", "max_sequence_length")


@dataclass(frozen=True)
class Design:
    """A network without its weights: its class and its config as JSON."""

    kind: Any
    config: str

    @classmethod
    def of(cls, model: Any) -> Design:
        """Return that of a diffusers model."""
        config = {k: v for k, v in model.config.items() if k[0] != "_" and k not in _WEIGHTS_OWN}
        return cls(type(model), json.dumps(config, sort_keys=True, default=_plain))

    def twin(self, device: str = "meta", short: bool = False) -> Any:
        """Return a network like it in float32 and eval mode, with arbitrary weights on ``device``.

        They take no gradients.

        Args:
            device: ``meta`` or ``cpu``.
            short: leave of each list of blocks the first two and the last, :func:`shorten`.
        """
        config = json.loads(self.config)
        with torch.inference_mode(False):
            if device == "meta":
                with torch.device("meta"):
                    twin = self.kind.from_config(config).to("meta")
                    if short:
                        shorten(twin)
            else:  # memory that is never written to is not taken up
                with init_empty_weights(), torch.random.fork_rng(devices=[]):
                    twin = self.kind.from_config(config)
                    if short:
                        shorten(twin)
                twin._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
        return twin.eval().requires_grad_(False)


def lists_of(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return a network's own lists of modules of one class, by name."""
    children = model.named_children()
    lists = {name: child for name, child in children if isinstance(child, nn.ModuleList)}
    return {name: blocks for name, blocks in lists.items() if len({type(b) for b in blocks}) == 1}


def shorten(model: nn.Module) -> None:
    """Leave of each list of blocks the first two and the last, which tell about all of them.

    A call of dozens of blocks takes its time on any device; the lengths are kept in ``lengths``.
    """
    lists = lists_of(model)
    model.lengths = {name: len(blocks) for name, blocks in lists.items()}  # type: ignore[assignment]
    for name, blocks in lists.items():
        if len(blocks) > _ENOUGH:
            setattr(model, name, nn.ModuleList([*blocks[: _ENOUGH - 1], blocks[-1]]))


_ENOUGH = 3
_WEIGHTS_OWN = {"quantization_config"}  # says nothing of what blocks are given


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


@dataclass(frozen=True)
class Fit:
    """How a network can be called.

    Attributes:
        layout: of its samples, one of ``LAYOUTS``.
        device: ``meta``, or ``cpu`` where that fails; the call is then a small one.
    """

    layout: str
    device: str


@lru_cache(maxsize=64)
def fit_of(design: Design, short: bool = False) -> Fit:
    """Return how a network can be called, which is tried on a twin.

    Args:
        design: the network's.
        short: whether on a :func:`shorten` ed one.

    Raises:
        AccelkitError: no layout of the sample makes a call, or a required argument is not known.
    """
    errors: list[tuple[int, str]] = []
    for device in ("meta", "cpu"):
        twin = design.twin(device, short)
        begun: list[nn.Module] = []
        for module in twin.modules():
            module.register_forward_pre_hook(lambda module, _, begun=begun: begun.append(module))
        for layout in LAYOUTS:
            given = arguments(twin, layout, 2, device, tiny=device == "cpu")
            sample = next(iter(given.values()))
            begun.clear()
            try:
                with torch.no_grad():
                    output = call(twin, given, device)
            except Exception as error:  # whatever a network does with a wrong layout
                errors.append((len(begun), str(error).strip() or type(error).__name__))
                continue
            if output.ndim == sample.ndim and len(output) == len(sample):
                return Fit(layout, device)
        if not any("meta" in error for _, error in errors):  # a device without values or autocast
            break
    furthest = max(errors)[1] if errors else "none returns its shape"
    raise AccelkitError(
        f"accelkit cannot call a {design.kind.__name__} by itself to see what its blocks are "
        f"given: a sample of none of the layouts {', '.join(LAYOUTS)} makes a call "
        f"({furthest.splitlines()[0][:100]}); {HOW}"
    )


def call(twin: Any, given: dict[str, Any], device: str) -> torch.Tensor:
    """Call a twin, with what it makes on its own on the device of the rest."""
    with torch.inference_mode(False), torch.device(device):
        output = twin(**given)
    return output if isinstance(output, torch.Tensor) else output[0]


def arguments(
    model: Any, layout: str, batch: int, device: Any, *, tiny: bool = False
) -> dict[str, Any]:
    """Return the arguments of a call of ``batch`` samples in ``layout``.

    Floats have the model's dtype; the timestep is 1 and everything else 0, masks let all through.

    Raises:
        AccelkitError: what a required argument is to hold is not known.
    """
    known = _Known(model, layout, batch, device, tiny)
    sample, *others = list(inspect.signature(type(model).forward).parameters.values())[1:]
    given = {sample.name: known.sample()}
    for parameter in others:
        required = parameter.default is parameter.empty
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue
        value = known.value(parameter.name, required)
        if value is not None:
            given[parameter.name] = value
        elif required:
            raise AccelkitError(
                f"accelkit cannot call a {type(model).__name__} by itself to see what its blocks "
                f"are given: what {parameter.name} is to hold is not known; {HOW}"
            )
    return given


SHARED = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "rotary_embedding", "return_dict"})
"""Arguments that all samples of a batch share."""


class _Known:
    """What arguments of these names hold in diffusers' networks."""

    def __init__(self, model: nn.Module, layout: str, batch: int, device: Any, tiny: bool) -> None:
        config: Any = model.config
        self.config, self.layout, self.batch, self.tiny = config, layout, batch, tiny
        self.like = {"device": device, "dtype": getattr(model, "dtype", torch.float32)}
        side = config.get("sample_size") or SIDE
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        height, width = config.get("sample_height", height), config.get("sample_width", width)
        frames = config.get("sample_frames") or config.get("video_length") or FRAMES
        frames = ceil((frames - 1) / (config.get("temporal_compression_ratio") or 1)) + 1
        if tiny:
            height = width = _TINY["side"]
            frames = _TINY["frames"]
        step = config.get("patch_size_t") or 1
        frames = ceil(frames / step) * step
        fixed = config.get("video_length")  # by an embedding of frames
        if frames == config.get("in_channels") and not fixed:  # so that no layout passes for both
            frames += step
        self.frames, self.height, self.width = frames, height, width

    def sample(self) -> torch.Tensor:
        """Return the noisy sample."""
        sizes = {
            "B": self.batch,
            "C": self.config.get("in_channels", 1),
            "F": self.frames,
            "H": self.height,
            "W": self.width,
            "N": self.height if self.layout == "BCN" else self.height * self.width,
        }
        return torch.zeros([sizes[axis] for axis in self.layout], **self.like)

    def value(self, name: str, required: bool) -> Any:
        """Return what argument ``name`` holds, None for nothing or if that is not known."""
        if name.endswith("mask") or "_mask_" in name:
            if not required and not name.startswith("text_"):
                return None
            return self._full(self._length(name), value=True, dtype=torch.bool)
        make: Callable[[], Any] | None = getattr(self, f"for_{name}", None)
        return None if make is None else make()

    def _full(self, *shape: int, value: Any = 0, **like: Any) -> torch.Tensor:
        return torch.full((self.batch, *shape), value, **{**self.like, **like})

    def _wide(self, key: str, *shape: int) -> torch.Tensor | None:
        width = self.config.get(key)
        return self._full(*shape, width) if isinstance(width, int) else None

    def _length(self, name: str) -> int:
        keys = ("text_len_t5",) if name.endswith("_t5") else _TEXT_LENGTHS
        known = [self.config.get(key) for key in keys]
        return next(
            (n for n in known if isinstance(n, int)), _TINY["tokens"] if self.tiny else TOKENS
        )

    def _ids(self, length: int) -> torch.Tensor | None:
        axes = self.config.get("axes_dims_rope")
        return torch.zeros(length, len(axes), **self.like) if axes else None

    def for_timestep(self) -> torch.Tensor:
        return self._full(value=1)

    def for_encoder_hidden_states(self) -> torch.Tensor | None:
        made = (self._wide(key, self._length("")) for key in _TEXT_WIDTHS)
        return next((value for value in made if value is not None), None)

    def for_encoder_hidden_states_t5(self) -> torch.Tensor | None:
        return self._wide("cross_attention_dim_t5", self._length("_t5"))

    def for_pooled_projections(self) -> torch.Tensor | None:
        return self._wide("pooled_projection_dim")

    def for_global_hidden_states(self) -> torch.Tensor | None:
        return self._wide("global_states_input_dim", 1)

    def for_guidance(self) -> torch.Tensor | None:
        return self._full() if self.config.get("guidance_embeds") else None

    def for_class_labels(self) -> torch.Tensor | None:
        keys = ("num_embeds_ada_norm", "num_classes", "num_class_embeds")
        labelled = any(self.config.get(key) for key in keys)
        return self._full(dtype=torch.long) if labelled else None

    def for_img_ids(self) -> torch.Tensor | None:
        return self._ids(self.height * self.width)

    def for_txt_ids(self) -> torch.Tensor | None:
        return self._ids(self._length(""))

    def for_img_shapes(self) -> list[list[tuple[int, int, int]]]:
        return [[(1, self.height, self.width)]] * self.batch

    def for_num_frames(self) -> int:
        return 1  # of packed tokens; other layouts tell theirs

    def for_height(self) -> int:
        return self.height

    def for_width(self) -> int:
        return self.width

    def for_original_size(self) -> torch.Tensor:
        return self._full(2)

    for_target_size = for_crop_coords = for_original_size

    def for_image_meta_size(self) -> torch.Tensor:
        return self._full(6)

    def for_style(self) -> torch.Tensor:
        return self._full(dtype=torch.long)

    def for_added_cond_kwargs(self) -> dict[str, torch.Tensor]:
        return {"resolution": self._full(2), "aspect_ratio": self._full(1)}
