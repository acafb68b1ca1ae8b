"""A network that accelkit never heard of, called as its own pipeline calls it.

The pipeline is run on a few prompts around a stand-in for its network, which costs the text
encoders and no pass of the network. What the stand-in is given tells the arguments that prompts
become and what the scheduler's timestep is turned into; what the scheduler is given tells what is
made of a prediction. Anything that is not plainly one of a few usual ways is refused.
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
from accelkit.backbones.conditioning import LEARNED, Captions, Rows, conditioning_of
from accelkit.backbones.registry import backbone_of, denoiser_of
from accelkit.errors import AccelkitError

_PROMPTS = ("a", "a bird", "")  # three, the number of nothing else in a call
_LONG = " ".join(["a bird"] * 8)
_STEPS = 3


@dataclass(frozen=True)
class Watched:
    """How a pipeline calls its network.

    Attributes:
        shape: of one sample of latents, (C, h, w).
        rows: names of the arguments with a row per prompt.
        null: of these, the row that the pipeline has for guidance, if it does guide.
        shared: the other arguments.
        scale, offset: the network is given ``scale * t + offset`` for the scheduler's timestep t.
        dtype: of what it is given.
        sign: of the network's output in what the scheduler is given, 1 or -1.
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
    """Learn how ``pipe`` calls its network and keep that with the network, if it is not known.

    Raises:
        AccelkitError: it cannot be made out, or is none of the ways that are understood.
    """
    backbone = backbone_of(denoiser_of(pipe))
    try:
        conditioning_of(backbone)
    except AccelkitError as unknown:
        if "prompt" not in inspect.signature(type(pipe).__call__).parameters:
            raise
        try:
            found = watch(pipe)
            _check_time(backbone, found)
        except _StrangeError as reason:
            raise AccelkitError(f"{unknown}; its pipeline was watched, but {reason}") from None
        vars(backbone.model)[LEARNED] = partial(WatchedCaptions, how=found)


class WatchedCaptions(Captions):
    """Text, which becomes what the network's own pipeline makes of it."""

    def __init__(self, backbone: Backbone, how: Watched) -> None:
        super().__init__(backbone)
        self.how = how

    @property
    def latent_settings(self) -> frozenset[str]:  # type: ignore[override]
        """Those that the pipeline was seen to apply."""
        return self.how.latent_settings

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents that the pipeline makes by itself."""
        return self.how.shape

    def _embed(self, pipe: Any, prompts: list[Any]) -> list[tuple[str, Tensor]]:
        try:
            (call,) = _run(pipe, prompts, steps=1)
        except _StrangeError as reason:
            raise AccelkitError(
                f"cannot embed captions by {type(pipe).__name__}: {reason}"
            ) from None
        rows = {name: call.given[name] for name in self.how.rows}
        for name, null in self.how.null.items():
            empty = [place for place, prompt in enumerate(prompts) if not prompt]
            rows[name][empty] = null.to(rows[name])
        return list(rows.items())

    def arguments(self, latents: Tensor, timestep: Tensor, rows: Rows) -> dict[str, Any]:
        """Return the arguments that the pipeline gives."""
        call = super().arguments(latents, timestep, rows)
        call["timestep"] = (self.how.scale * timestep + self.how.offset).to(self.how.dtype)
        return call | {name: _moved(value, latents) for name, value in self.how.shared.items()}

    def prediction(self, output: Tensor, latents: Tensor) -> Tensor:
        """Return what the pipeline gives its scheduler."""
        return self.how.sign * output

    def spacing(self, pipe: Any, steps: int) -> dict[str, Any]:
        """Return what the pipeline gives its scheduler."""
        try:
            return _spacing(pipe, steps)
        except _StrangeError as reason:
            raise AccelkitError(
                f"cannot tell the timesteps of {type(pipe).__name__}: {reason}"
            ) from None


class _StrangeError(Exception):
    """What is unusual about a call."""


class _Enough(Exception):  # noqa: N818 - no error: the run is over
    """All steps that were wanted have been seen."""


@dataclass
class _Call:
    """A step: what the network was given and returned, what the scheduler was given and made."""

    given: dict[str, Any]
    returned: Tensor
    predicted: Any = None
    timestep: float = 0.0
    sample: Tensor | None = None


def watch(pipe: Any) -> Watched:
    """Return how ``pipe`` calls its network.

    Raises:
        _StrangeError: in none of the ways that are understood.
    """
    model, vae = denoiser_of(pipe), autoencoder_of(pipe)
    calls = _run(pipe, list(_PROMPTS), _STEPS)
    if len(calls) < _STEPS or any(call.predicted is None for call in calls):
        raise _StrangeError(f"it called its network {len(calls)} times in {_STEPS} steps")
    first, count = calls[0], len(_PROMPTS)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
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
        elif value:  # an empty dictionary says nothing
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
    """Return what stands beside a prompt's rows where a pipeline guides, nothing if it does not.

    Args:
        pipe: the pipeline.
        names: of the arguments with a row per prompt.
        alone: the call for the same prompt, ``_LONG``, without guidance.
    """
    found = []
    for call in _run(pipe, [_LONG], 1, guidance=2.0):
        for place in range(len(call.returned)):
            found.append({name: call.given[name][place] for name in names})
    if len(found) == 1:
        return {}
    others = [r for r in found if any(not _same(r[n], alone.given[n][0]) for n in names)]
    if (len(found), len(others)) != (2, 1):
        raise _StrangeError("what it is given without a prompt, to guide by, was not told apart")
    if any(others[0][name].shape != alone.given[name][0].shape for name in names):
        raise _StrangeError("what it is given without a prompt has another shape than with one")
    return others[0]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _time(calls: Sequence[_Call]) -> tuple[float, float, torch.dtype]:
    """Return scale and offset of the network's timesteps, and their dtype."""
    given = [torch.as_tensor(call.given.get("timestep", torch.nan)) for call in calls]
    if any(len(set(value.flatten().tolist())) != 1 for value in given):
        raise _StrangeError("it is given several timesteps at once")
    told = [float(value.flatten()[0]) for value in given]
    steps = [call.timestep for call in calls]
    width = abs(told[0] - told[-1])
    for scale, offset in TIMES.values():  # which half precision may have rounded
        off = [abs(scale * t + offset - v) for t, v in zip(steps, told, strict=True)]
        if max(off) < 0.01 * width:
            return scale, offset, given[0].dtype
    raise _StrangeError(
        f"it is given the timesteps {_listed(told)} where its scheduler has {_listed(steps)}"
    )


def _check_time(backbone: Backbone, found: Watched) -> None:
    """Raise _StrangeError where a schedule would read another noise level than is meant."""
    for t in (250.0, 750.0):
        read = backbone.scheduler_timestep(found.scale * t + found.offset)
        if abs(read - t) > 1:
            raise _StrangeError(
                f"it is given {found.scale * t + found.offset:g} at its scheduler's timestep "
                f"{t:g}, which accelkit reads as {read:g}"
            )


def _latent_settings(pipe: Any) -> frozenset[str]:
    """Return the settings by which the latents that a run ends with become those it decodes."""
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
        except AccelkitError:  # the autoencoder lacks these settings
            continue
        if torch.allclose(decoded[0].float(), call.sample.float() / scale + shift, atol=1e-2):
            return applied
    raise _StrangeError("its autoencoder is given something else than the scaled latents")


_WAYS = (
    frozenset({"scaling_factor"}),
    frozenset({"scaling_factor", "shift_factor"}),
    frozenset({"latents_mean", "latents_std"}),
    AT_USE,
)
"""Settings that pipelines apply to latents, of which the first that explains a run is taken."""


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _sign(calls: Sequence[_Call]) -> int:
    for sign in (1, -1):
        if all(_equal(call.predicted, sign * call.returned) for call in calls):
            return sign
    raise _StrangeError("its output is not what the scheduler was given")


def _equal(one: Tensor, other: Tensor) -> bool:
    # a variance that the network learned as well may have been cut off, or not
    channels = one.shape[1] if one.ndim == other.ndim else 0
    return channels > 0 and torch.allclose(one.float(), other[:, :channels].float(), atol=1e-2)


def _moved(value: Any, latents: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(latents if value.is_floating_point() else latents.device)


@torch.no_grad()
def _run(
    pipe: Any,
    prompts: list[str],
    steps: int,
    guidance: float = 1.0,
    to_the_end: bool = False,
) -> list[_Call]:
    """Return the calls of a pipeline's network in a run, by default without guidance.

    A single step is left before the scheduler takes it, unless the run is to go to its end.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
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
    if "guidance" in inspect.signature(type(model).forward).parameters:
        del options["guidance_scale"]  # a distilled network's is no second pass, and not 1
    options = {name: value for name, value in options.items() if name in takes}
    calls: list[_Call] = []
    try:
        with _stood_in(pipe, calls, stop=steps == 1 and not to_the_end):
            pipe(prompt=prompts, **options)
    except _Enough:
        pass
    except (_StrangeError, AccelkitError):
        raise
    except Exception as error:  # whatever a pipeline needs beside prompts
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise _StrangeError(f"it does not run on prompts alone: {why}") from error
    return calls


def _spacing(pipe: Any, steps: int) -> dict[str, Any]:
    """Return the arguments of the pipeline's call of ``set_timesteps`` that space the steps."""
    own, scheduler = copy.copy(pipe), copy.copy(pipe.scheduler)
    given: dict[str, Any] = {}

    @wraps(pipe.scheduler.set_timesteps)  # its arguments are looked up
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        takes = inspect.signature(pipe.scheduler.set_timesteps)
        given.update(takes.bind(*args, **kwargs).arguments)
        raise _Enough

    vars(scheduler)["set_timesteps"] = set_timesteps
    vars(own)["scheduler"] = scheduler
    _run(own, [_PROMPTS[0]], steps)
    known = ("sigmas", "timesteps", "mu")
    return {name: given[name] for name in known if given.get(name) is not None}


@contextmanager
def _stood_in(pipe: Any, calls: list[_Call], stop: bool) -> Iterator[None]:
    """Put stand-ins for network and step in a pipeline's place, as long as it is entered.

    Args:
        pipe: the pipeline.
        calls: where its calls are recorded.
        stop: whether to leave at the first step.
    """
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    model: Any = denoiser_of(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    factor = (
        2 if model.config.get("out_channels") == 2 * (model.config.get("in_channels") or 0) else 1
    )
    step = scheduler.step

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        sample = given[names[0]]
        if not isinstance(sample, Tensor):
            raise _StrangeError(f"its {names[0]} were a {type(sample).__name__}")
        returned = torch.randn_like(torch.cat([sample] * factor, dim=1))
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
    """Give an object an attribute of its own, as long as it is entered."""
    before = vars(part).get(name, _ABSENT)
    vars(part)[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            vars(part).pop(name, None)
        else:
            vars(part)[name] = before
