"""A network without a conditioning of its own, called as its own pipeline calls it.

The pipeline is run on a few prompts around a stand-in for its network, which costs the text
encoders but no pass of the network. The stand-in's arguments show what prompts become and what the
scheduler's timestep is turned into; the scheduler's show what is made of a prediction. Anything
that is not clearly one of a few usual ways is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from accelkit.backbones.autoencoders import AT_USE, autoencoder_of, scaling
from accelkit.backbones.base import TIMES, Backbone
from accelkit.backbones.conditioning import (
    LEARNED,
    NORMALISED,
    SCALED,
    SHIFTED,
    Captions,
    Rows,
    conditioning_of,
)
from accelkit.backbones.example import takes
from accelkit.backbones.registry import backbone_of, denoiser_of
from accelkit.errors import AccelkitError

_PROMPTS = ("a", "a bird", "")  # three, so the batch axis cannot be mistaken for another
_LONG = " ".join(["a bird"] * 8)
_STEPS = 3

_WAYS = (SCALED, SHIFTED, NORMALISED, AT_USE)
"""Settings that pipelines apply to latents. The first that explains a run is used."""


@dataclass(frozen=True)
class Watched:
    """How a pipeline calls its network.

    Attributes:
        shape: shape of one sample of latents, (C, h, w).
        rows: names of the arguments with a row per prompt.
        null: for each of these, the pipeline's row for guidance; empty if it does not guide.
        shared: the other arguments.
        scale, offset: the network is given ``scale * t + offset`` for the scheduler's timestep t.
        dtype: dtype of the timestep.
        sign: 1, or -1 if the scheduler is given the network's negated output.
        latent_settings: settings of the autoencoder that the pipeline applies to latents.
    """

    shape: tuple[int, ...]
    rows: tuple[str, ...]
    null: dict[str, Tensor]
    shared: dict[str, Any]
    scale: float
    offset: float
    dtype: torch.dtype
    sign: int
    latent_settings: frozenset[str]


def learn(pipe: Any) -> None:
    """Learn how ``pipe`` calls its network, unless it is known, and store it with the network.

    Raises:
        AccelkitError: the way is not clear, or not one of those that are understood.
    """
    backbone = backbone_of(denoiser_of(pipe))
    try:
        conditioning_of(backbone)
    except AccelkitError as unknown:
        if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
            raise
        with _saying(f"{unknown}; its pipeline was watched, but "):
            found = watch(pipe)
            _check_time(backbone, found)
        vars(backbone.model)[LEARNED] = partial(WatchedCaptions, how=found)


class WatchedCaptions(Captions):
    """Text, embedded by running the network's own pipeline."""

    def __init__(self, backbone: Backbone, how: Watched) -> None:
        super().__init__(backbone)
        self.how = how

    @property
    def latent_settings(self) -> frozenset[str]:  # type: ignore[override]
        """The settings that the pipeline was seen to apply."""
        return self.how.latent_settings

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents that the pipeline makes by default."""
        return self.how.shape

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        with _saying(f"cannot embed captions by {type(pipe).__name__}: "):
            (call,) = _run(pipe, prompts, steps=1)
        rows = {name: call.given[name] for name in self.how.rows}
        for name, null in self.how.null.items():
            empty = [place for place, prompt in enumerate(prompts) if not prompt]
            rows[name][empty] = null.to(rows[name])
        return list(rows.items())

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        """Return the arguments as the pipeline gives them."""
        call = super().arguments(latents, timestep, rows)
        call["timestep"] = (self.how.scale * timestep + self.how.offset).to(self.how.dtype)
        for name, value in self.how.shared.items():
            if isinstance(value, Tensor):
                value = value.to(latents if value.is_floating_point() else latents.device)
            call[name] = value
        return call

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """Return the prediction as the pipeline gives it to its scheduler."""
        return self.how.sign * output

    def spacing(self, pipe: Any, steps: int) -> dict[str, Any]:
        """Return the arguments with which the pipeline spaces its scheduler's steps."""
        with _saying(f"cannot find the timesteps of {type(pipe).__name__}: "):
            return _spacing(pipe, steps)


class _StrangeError(Exception):
    """Something unusual about a call."""


class _Enough(Exception):  # noqa: N818 - it ends a run and is no error
    """All steps that were needed have been seen."""


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Turn a _StrangeError into an AccelkitError that begins with ``what``."""
    try:
        yield
    except _StrangeError as reason:
        raise AccelkitError(f"{what}{reason}") from None


@dataclass
class _Call:
    """A step: the network's arguments and output, the scheduler's arguments and sample."""

    given: dict[str, Any]
    returned: Tensor
    predicted: Any = None
    timestep: float = 0.0
    sample: Tensor | None = None


def watch(pipe: Any) -> Watched:
    """Return how ``pipe`` calls its network.

    Raises:
        _StrangeError: it does so in none of the ways that are understood.
    """
    model, vae = denoiser_of(pipe), autoencoder_of(pipe)
    calls = _run(pipe, list(_PROMPTS), _STEPS)
    if len(calls) < _STEPS or any(call.predicted is None for call in calls):
        raise _StrangeError(f"it called its network {len(calls)} times in {_STEPS} steps")
    first, count = calls[0], len(_PROMPTS)
    names = takes(type(model))
    sample = first.given.get(names[0])
    channels = None if vae is None else vae.config.get("latent_channels")
    if not isinstance(sample, Tensor) or sample.ndim != 4 or sample.shape[:2] != (count, channels):
        shape = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise _StrangeError(
            f"for {count} prompts its {names[0]} were {shape} and no maps of the autoencoder's "
            f"{channels} channels"
        )
    rows, shared = {}, {}
    for name, value in first.given.items():
        if name in (names[0], "timestep", "return_dict") or value is None:
            continue
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            rows[name] = tuple(value.shape[1:])
        elif isinstance(value, (Tensor, bool, int, float, str)):
            shared[name] = value
        elif value:  # An empty dictionary has no effect.
            raise _StrangeError(f"it is given {name}, a {type(value).__name__}")
    (longer,) = _run(pipe, [_LONG], 1)
    for name, shape in rows.items():
        if tuple(longer.given[name].shape[1:]) != shape:
            raise _StrangeError(
                f"its {name} grow with the prompt, which cannot be mixed in a batch"
            )
    null = _null(pipe, list(rows), longer)
    scale, offset, dtype = _time(calls)
    return Watched(
        shape=tuple(sample.shape[1:]),
        rows=tuple(rows),
        null=null,
        shared=shared,
        scale=scale,
        offset=offset,
        dtype=dtype,
        sign=_sign(calls),
        latent_settings=_latent_settings(pipe),
    )


def _null(pipe: Any, names: Sequence[str], alone: _Call) -> dict[str, Tensor]:
    """Return the rows that a pipeline uses in place of a prompt's to guide, if it guides.

    Args:
        pipe: the pipeline.
        names: names of the arguments with a row per prompt.
        alone: the call for the prompt ``_LONG`` without guidance.
    """
    found = []
    for call in _run(pipe, [_LONG], 1, guidance=2.0):
        for place in range(len(call.returned)):
            found.append({name: call.given[name][place] for name in names})
    if len(found) == 1:
        return {}

    def same(row: dict[str, Tensor]) -> bool:
        return all(torch.equal(row[name], alone.given[name][0]) for name in names)

    others = [row for row in found if not same(row)]
    if (len(found), len(others)) != (2, 1):
        raise _StrangeError(
            "the rows that it is given without a prompt, for guidance, could not be identified"
        )
    if any(others[0][name].shape != alone.given[name][0].shape for name in names):
        raise _StrangeError("its rows without a prompt have another shape than with one")
    return others[0]


def _time(calls: Sequence[_Call]) -> tuple[float, float, torch.dtype]:
    """Return scale and offset of the network's timesteps, and their dtype."""
    tensors = [torch.as_tensor(call.given.get("timestep", torch.nan)) for call in calls]
    if any(len(set(tensor.flatten().tolist())) != 1 for tensor in tensors):
        raise _StrangeError("it is given several timesteps at once")
    given = [float(tensor.flatten()[0]) for tensor in tensors]
    steps = [call.timestep for call in calls]
    width = abs(given[0] - given[-1])
    for scale, offset in TIMES.values():
        off = [abs(scale * t + offset - v) for t, v in zip(steps, given, strict=True)]
        if max(off) < 0.01 * width:  # Half precision may have rounded the values.
            return scale, offset, tensors[0].dtype
    raise _StrangeError(
        f"it is given the timesteps {_listed(given)} where its scheduler has {_listed(steps)}"
    )


def _check_time(backbone: Backbone, found: Watched) -> None:
    """Raise _StrangeError if a schedule would read another noise level than the scheduler's."""
    for t in (250.0, 750.0):
        read = backbone.scheduler_timestep(found.scale * t + found.offset)
        if abs(read - t) > 1:
            raise _StrangeError(
                f"it is given {found.scale * t + found.offset:g} at its scheduler's timestep "
                f"{t:g}, which accelkit reads as {read:g}"
            )


def _latent_settings(pipe: Any) -> frozenset[str]:
    """Return the settings that turn the latents at the end of a run into those it decodes."""
    vae = autoencoder_of(pipe)
    decoded: list[Tensor] = []

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(latents)
        raise _Enough

    with _put(vae, "decode", decode):
        (call,) = _run(pipe, [_LONG], 1, to_the_end=True)
    if not decoded or call.sample is None or decoded[0].shape != call.sample.shape:
        raise _StrangeError("its autoencoder is not given the maps that its scheduler ends with")
    for applied in _WAYS:
        try:
            shift, scale = scaling(vae, applied)
        except AccelkitError:  # The autoencoder lacks these settings.
            continue
        if torch.allclose(decoded[0].float(), call.sample.float() / scale + shift, atol=1e-2):
            return applied
    raise _StrangeError("its autoencoder is not given the scaled latents")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _sign(calls: Sequence[_Call]) -> int:
    def equal(one: Tensor, other: Tensor) -> bool:
        # A variance that the network learned may have been cut off.
        channels = one.shape[1] if one.ndim == other.ndim else 0
        return channels > 0 and torch.allclose(one.float(), other[:, :channels].float(), atol=1e-2)

    for sign in (1, -1):
        if all(equal(call.predicted, sign * call.returned) for call in calls):
            return sign
    raise _StrangeError("its output is not what the scheduler was given")


@torch.no_grad()
def _run(
    pipe: Any,
    prompts: list[str],
    steps: int,
    guidance: float = 1.0,
    to_the_end: bool = False,
) -> list[_Call]:
    """Return the calls of a pipeline's network in a run, by default without guidance.

    A run of a single step stops before the scheduler takes it, unless ``to_the_end``.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "output_type": "pt" if to_the_end else "latent",
        "guidance_scale": guidance,
        "use_resolution_binning": False,
    }
    model: Any = denoiser_of(pipe)
    side = model.config.get("sample_size")
    if isinstance(side, int) and getattr(pipe, "vae_scale_factor", None):
        options |= dict.fromkeys(("height", "width"), side * pipe.vae_scale_factor)
    if "guidance" in takes(type(model)):
        del options["guidance_scale"]  # A distilled network takes the scale as an input.
    options = {name: value for name, value in options.items() if name in known}
    calls: list[_Call] = []
    try:
        with _stood_in(pipe, calls, stop=steps == 1 and not to_the_end):
            pipe(prompt=prompts, **options)
    except _Enough:
        pass
    except (_StrangeError, AccelkitError):
        raise
    except Exception as error:  # A pipeline that needs more than prompts can raise anything.
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise _StrangeError(f"it does not run on prompts alone: {why}") from error
    return calls


def _spacing(pipe: Any, steps: int) -> dict[str, Any]:
    """Return the arguments of ``set_timesteps`` with which the pipeline spaces the steps."""
    own, scheduler = copy.copy(pipe), copy.copy(pipe.scheduler)
    given: dict[str, Any] = {}

    @wraps(pipe.scheduler.set_timesteps)  # Pipelines inspect its signature.
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(pipe.scheduler.set_timesteps)
        given.update(signature.bind(*args, **kwargs).arguments)
        raise _Enough

    vars(scheduler)["set_timesteps"] = set_timesteps
    vars(own)["scheduler"] = scheduler
    _run(own, [_PROMPTS[0]], steps)
    known = ("sigmas", "timesteps", "mu")
    return {name: given[name] for name in known if given.get(name) is not None}


@contextmanager
def _stood_in(pipe: Any, calls: list[_Call], stop: bool) -> Iterator[None]:
    """Replace a pipeline's network and scheduler step by stand-ins while the context is entered.

    Args:
        pipe: the pipeline.
        calls: list that its calls are appended to.
        stop: stop the run at the first step.
    """
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    model: Any = denoiser_of(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    names, config = takes(type(model)), model.config
    variance = config.get("out_channels") == 2 * (config.get("in_channels") or 0)
    step = scheduler.step

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        sample = given[names[0]]
        if not isinstance(sample, Tensor):
            raise _StrangeError(f"its {names[0]} were a {type(sample).__name__}")
        returned = torch.randn_like(torch.cat([sample] * (1 + variance), dim=1))
        calls.append(_Call(given, returned))
        if given.get("return_dict", True):
            return Transformer2DModelOutput(sample=returned)
        return (returned,)

    def stepped(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if calls:
            calls[-1].predicted, calls[-1].timestep = model_output, float(timestep)
        if stop:
            raise _Enough
        made = step(model_output, timestep, *args, **kwargs)
        if calls:
            calls[-1].sample = made[0]
        return made

    with ExitStack() as stack:
        for part, name, value in (
            (model, "forward", forward),
            (scheduler, "step", stepped),
            (pipe, "scheduler", scheduler),
            (pipe, "_progress_bar_config", {"disable": True}),
        ):
            stack.enter_context(_put(part, name, value))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield


_ABSENT = object()


@contextmanager
def _put(part: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object while the context is entered."""
    before = vars(part).get(name, _ABSENT)
    vars(part)[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            vars(part).pop(name, None)
        else:
            vars(part)[name] = before
