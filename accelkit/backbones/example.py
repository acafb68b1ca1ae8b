"""Calls of a network made up from the signature of its forward and its config.

They are for calls whose values do not matter: to count the cost, or to watch what blocks are given.
They run on a twin of the network with its config and without weights, on the meta device. A network
that reads the values of its arguments, such as the length of a text from its mask, cannot run there
and gets a small call on a twin with arbitrary weights.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from accelkit.errors import AccelkitError

SIDE, FRAMES, TOKENS = 64, 8, 256
"""Height and width of latents, frames and text tokens where a config does not have them."""
_TINY_SIDE, _TINY_FRAMES, _TINY_TOKENS = 8, 4, 6

LAYOUTS = ("BCHW", "BCFHW", "BFCHW", "BNC", "BCN")
"""Layouts of samples: maps, videos, frames of a video, tokens, signals."""

SHARED = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "rotary_embedding", "return_dict"})
"""Arguments that all samples of a batch share."""

HOW = "describe them with accelkit.register_backbone(cls, backbone)"
"""What to do about blocks that cannot be found."""

# A config may have several widths of text; the width before a projection comes first.
_TEXT_WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "cross_attention_input_dim",
    "cross_attention_dim",
)
_TEXT_LENGTHS = ("text_len", "max_text_seq_length", "max_sequence_length")
_LABELS = ("num_embeds_ada_norm", "num_classes", "num_class_embeds")

_ENOUGH = 3  # blocks of a list that are kept in a shortened twin: the first two and the last


def takes(kind: Any) -> list[str]:
    """Return the names of the arguments that the forward of a class takes."""
    return list(inspect.signature(kind.forward).parameters)[1:]


@dataclass(frozen=True)
class Design:
    """A network without its weights: its class and its config as JSON."""

    kind: Any
    config: str

    @classmethod
    def of(cls, model: Any) -> Design:
        """Return the design of a diffusers model."""
        settings = {k: v for k, v in model.config.items() if k[0] != "_"}
        settings.pop("quantization_config", None)  # It has no effect on the calls of blocks.
        return cls(type(model), json.dumps(settings, sort_keys=True, default=_plain))

    def twin(self, device: str = "meta", short: bool = False) -> Any:
        """Return a network of this design in float32 and eval mode, without gradients.

        Args:
            device: ``meta``, or ``cpu`` for arbitrary weights.
            short: keep only the first two blocks and the last of every list of blocks, which show
                how all of them are called; a call of dozens takes long on any device. The
                attribute ``lengths`` has the lengths of the whole lists.
        """
        settings = json.loads(self.config)
        with torch.inference_mode(False):
            if device == "meta":
                with torch.device("meta"):
                    twin = self.kind.from_config(settings).to("meta")
            else:
                with init_empty_weights(), torch.random.fork_rng(devices=[]):
                    twin = self.kind.from_config(settings)
            if short:
                lists = lists_of(twin)
                twin.lengths = {name: len(blocks) for name, blocks in lists.items()}
                for name, blocks in lists.items():
                    if len(blocks) > _ENOUGH:
                        setattr(twin, name, nn.ModuleList([*blocks[: _ENOUGH - 1], blocks[-1]]))
            if device != "meta":  # Memory that is never written to is not taken up.
                twin._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
        return twin.eval().requires_grad_(False)


def lists_of(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return a network's own lists of modules of one class, by name."""
    children = model.named_children()
    lists = {name: child for name, child in children if isinstance(child, nn.ModuleList)}
    return {name: blocks for name, blocks in lists.items() if len({type(b) for b in blocks}) == 1}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


@dataclass(frozen=True)
class Fit:
    """How a network can be called.

    Attributes:
        layout: layout of its samples, one of ``LAYOUTS``.
        device: ``meta``, or ``cpu`` where that fails; the call is then a small one.
    """

    layout: str
    device: str

    def arguments(self, twin: nn.Module) -> dict[str, Any]:
        """Return the arguments of a call of a twin with two samples."""
        return arguments(twin, self.layout, 2, self.device, tiny=self.device != "meta")


@lru_cache(maxsize=64)
def fit_of(design: Design, short: bool = False) -> Fit:
    """Return how a network can be called, found by trying on a twin, possibly a short one.

    Raises:
        AccelkitError: no layout of the sample makes a call, or the meaning of a required argument
            is not known.
    """
    errors: list[tuple[int, str]] = []
    for device in ("meta", "cpu"):
        twin = design.twin(device, short)
        begun: list[nn.Module] = []
        for module in twin.modules():
            module.register_forward_pre_hook(lambda module, _, begun=begun: begun.append(module))
        for fit in (Fit(layout, device) for layout in LAYOUTS):
            given = fit.arguments(twin)
            sample = next(iter(given.values()))
            begun.clear()
            try:
                with torch.no_grad():
                    output = call(twin, given, device)
            except Exception as error:  # A wrong layout can raise anything.
                errors.append((len(begun), str(error).strip() or type(error).__name__))
                continue
            if output.ndim == sample.ndim and len(output) == len(sample):
                return fit
        if not any("meta" in error for _, error in errors):  # Neither values nor autocast there.
            break
    furthest = max(errors)[1] if errors else "none returns its shape"
    raise AccelkitError(
        f"accelkit cannot call a {design.kind.__name__} by itself to see what its blocks are "
        f"given: a sample of none of the layouts {', '.join(LAYOUTS)} makes a call "
        f"({furthest.splitlines()[0][:100]}); {HOW}"
    )


def call(twin: Any, given: dict[str, Any], device: str) -> Tensor:
    """Return the output of a twin, which creates its own tensors on ``device`` too."""
    with torch.inference_mode(False), torch.device(device):
        output = twin(**given)
    return output if isinstance(output, Tensor) else output[0]


def arguments(
    model: Any, layout: str, batch: int, device: Any, *, tiny: bool = False
) -> dict[str, Any]:
    """Return the arguments of a call of ``batch`` samples in ``layout``.

    Floats have the model's dtype; the timestep is 1, everything else 0, and masks hide nothing.

    Raises:
        AccelkitError: the meaning of a required argument is not known.
    """
    values = _Values(model, layout, batch, device, tiny)
    sample, *others = list(inspect.signature(type(model).forward).parameters.values())[1:]
    known = values.known()
    given = {sample.name: values.sample()}
    for parameter in others:
        name, required = parameter.name, parameter.default is parameter.empty
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            continue
        if name.endswith("mask") or "_mask_" in name:
            needed = required or name.startswith("text_")
            value = values.mask(name) if needed else None
        else:
            value = known.get(name)
        if value is not None:
            given[name] = value
        elif required:
            raise AccelkitError(
                f"accelkit cannot call a {type(model).__name__} by itself to see what its blocks "
                f"are given: what {name} is to hold is not known; {HOW}"
            )
    return given


class _Values:
    """The values of arguments, which have the same names in all of diffusers' networks."""

    def __init__(self, model: nn.Module, layout: str, batch: int, device: Any, tiny: bool) -> None:
        config: Any = model.config
        self.config, self.layout, self.batch, self.tiny = config, layout, batch, tiny
        self.like = {"device": device, "dtype": getattr(model, "dtype", torch.float32)}
        side = config.get("sample_size") or SIDE
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        self.height = config.get("sample_height", height)
        self.width = config.get("sample_width", width)
        frames = config.get("sample_frames") or config.get("video_length") or FRAMES
        frames = ceil((frames - 1) / (config.get("temporal_compression_ratio") or 1)) + 1
        if tiny:
            self.height = self.width = _TINY_SIDE
            frames = _TINY_FRAMES
        step = config.get("patch_size_t") or 1
        frames = ceil(frames / step) * step
        # With as many frames as channels, two layouts would fit; an embedding fixes video_length.
        if frames == config.get("in_channels") and not config.get("video_length"):
            frames += step
        self.frames = frames

    def sample(self) -> Tensor:
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

    def mask(self, name: str) -> Tensor:
        """Return a mask that hides no token of the text."""
        return self._full(self._length(name.endswith("_t5")), value=True, dtype=torch.bool)

    def known(self) -> dict[str, Any]:
        """Return the values of all other arguments whose meaning is known, None if not used."""
        config, text = self.config, self._length()
        texts = (self._wide(key, text) for key in _TEXT_WIDTHS)
        labelled = any(config.get(key) for key in _LABELS)
        return {
            "timestep": self._full(value=1),
            "encoder_hidden_states": next((v for v in texts if v is not None), None),
            "encoder_hidden_states_t5": self._wide("cross_attention_dim_t5", self._length(True)),
            "pooled_projections": self._wide("pooled_projection_dim"),
            "global_hidden_states": self._wide("global_states_input_dim", 1),
            "guidance": self._full() if config.get("guidance_embeds") else None,
            "class_labels": self._full(dtype=torch.long) if labelled else None,
            "img_ids": self._ids(self.height * self.width),
            "txt_ids": self._ids(text),
            "img_shapes": [[(1, self.height, self.width)]] * self.batch,
            "num_frames": 1,  # of packed tokens; other layouts have an axis of frames
            "height": self.height,
            "width": self.width,
            "original_size": self._full(2),
            "target_size": self._full(2),
            "crop_coords": self._full(2),
            "image_meta_size": self._full(6),
            "style": self._full(dtype=torch.long),
            "added_cond_kwargs": {"resolution": self._full(2), "aspect_ratio": self._full(1)},
        }

    def _full(self, *shape: int, value: Any = 0, **like: Any) -> Tensor:
        return torch.full((self.batch, *shape), value, **{**self.like, **like})

    def _wide(self, key: str, *shape: int) -> Tensor | None:
        width = self.config.get(key)
        return self._full(*shape, width) if isinstance(width, int) else None

    def _length(self, t5: bool = False) -> int:
        keys = ("text_len_t5",) if t5 else _TEXT_LENGTHS
        known = [n for n in map(self.config.get, keys) if isinstance(n, int)]
        return known[0] if known else _TINY_TOKENS if self.tiny else TOKENS

    def _ids(self, length: int) -> Tensor | None:
        axes = self.config.get("axes_dims_rope")
        return torch.zeros(length, len(axes), **self.like) if axes else None
