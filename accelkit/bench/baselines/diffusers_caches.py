"""Puts diffusers' caches on a model by their functions, which need no CacheMixin."""

from __future__ import annotations

import ast
import contextlib
import io
import math
import weakref
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from accelkit.backbones import Backbone
from accelkit.bench.baselines.restored import restored
from accelkit.bench.baselines.trials import Unavailable, some_items
from accelkit.runtime.patching import parameters
from accelkit.runtime.switch import enabled_on
from accelkit.sample.generate import Sampling, generate_latents
from accelkit.subject import Subject


def first_block_cache(on: Subject, sampling: Sampling, threshold: float) -> None:
    """Skip all blocks but the first while its residual changes by less than a threshold."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    _look_for_blocks(on, "FirstBlockCache")
    apply_first_block_cache(on.model, FirstBlockCacheConfig(threshold=threshold))


def mag_cache(on: Subject, sampling: Sampling, threshold: float) -> None:
    """Skip all blocks while the error predicted from ratios of magnitudes is below a threshold.

    The library calibrates the ratios in a run of its own, once for each model and sampling.
    """
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    _look_for_blocks(on, "MagCache")
    how = MagCacheConfig(
        threshold=threshold,
        num_inference_steps=sampling.calls(on),
        mag_ratios=_magnitudes(on, sampling),
    )
    apply_mag_cache(on.model, how)


def _look_for_blocks(on: Subject, title: str) -> None:
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as KNOWN

    if not any(name in KNOWN for name, _ in on.model.named_children()):
        raise Unavailable(
            f"{title} looks for blocks by names that a {type(on.model).__name__} does not have"
        )


_calibrated: weakref.WeakKeyDictionary[nn.Module, dict[Any, list[float]]] = (
    weakref.WeakKeyDictionary()
)


def _magnitudes(on: Subject, sampling: Sampling) -> list[float]:
    """Return the ratios over four images, read from what MagCache prints: it returns nothing."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    state, known = enabled_on(on), _calibrated.setdefault(on.model, {})
    key = (sampling, None if state is None else str(state.schedule))
    if key not in known:
        printed = io.StringIO()
        with restored(on.model), contextlib.redirect_stdout(printed):
            how = MagCacheConfig(num_inference_steps=sampling.calls(on), calibrate=True)
            apply_mag_cache(on.model, how)
            generate_latents(on, some_items(on, 4), range(4), sampling)
        rows = [line for line in printed.getvalue().splitlines() if line.startswith("[")]
        known[key] = ast.literal_eval(rows[-1])
    return known[key]


def pab(on: Subject, sampling: Sampling, interval: int) -> None:
    """Let each attention repeat its last output, except at every ``interval``-th call."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    clock = _Clock(on.backbone)
    how = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval, current_timestep_callback=clock.timestep
    )
    apply_pyramid_attention_broadcast(on.model, how)
    _hook(on.model, clock)


def faster_cache(on: Subject, sampling: Sampling, interval: int) -> None:
    """Extrapolate attentions and the unguided half, except at every ``interval``-th call."""
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    guided = sampling.guidance != 1
    if guided and on.backbone.layout not in ("BCHW", "BCFHW"):
        raise Unavailable(
            f"FasterCache extrapolates the half without guidance as maps, a "
            f"{type(on.model).__name__} returns tokens"
        )
    clock, split = _Clock(on.backbone), _per_sample(on) if guided else []
    how = FasterCacheConfig(
        spatial_attention_block_skip_range=interval,
        attention_weight_callback=lambda _: 0.5,  # the default, which warns
        is_guidance_distilled=not guided,  # there is no second half to skip
        tensor_format=on.backbone.layout if guided else "BCHW",
        current_timestep_callback=clock.timestep,
        _unconditional_conditional_input_kwargs_identifiers=split,
    )
    apply_faster_cache(on.model, how)
    if guided:
        _hook(on.model, _HalvesExchanged(split))
    _hook(on.model, clock)


def _per_sample(on: Subject) -> list[str]:
    """Return the arguments of a model's call that have a row for every sample."""
    calls, count = on.calls, 3
    latents = torch.zeros(count, *calls.shape).to(on.model.device, on.model.dtype)
    rows = calls.encode(on.pipe, some_items(on, count))
    call = calls.arguments(latents, torch.zeros(count), rows)
    return [name for name, v in call.items() if isinstance(v, torch.Tensor) and len(v) == count]


def taylorseer(on: Subject, sampling: Sampling, interval: int, what: str) -> None:
    """Extrapolate the outputs of attentions or whole blocks between every ``interval``-th call."""
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    blocks = list(on.backbone.all_blocks)
    kept = set(blocks) if what == "blocks" else _attentions(on.backbone)
    # Found by class: the default patterns miss attentions named "attn1" or by a number.
    names = [name.replace(".", r"\.") for name, m in on.model.named_modules() if m in kept]
    how = TaylorSeerCacheConfig(
        cache_interval=interval,
        taylor_factors_dtype=on.model.dtype,  # the default rounds to bfloat16
        cache_identifiers=names,
    )
    apply_taylorseer_cache(on.model, how)


def _attentions(backbone: Backbone) -> set[nn.Module]:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    found = {attention for each in backbone.attentions() for attention in each}
    for block in backbone.all_blocks:
        found |= {m for m in block.modules() if isinstance(m, (Attention, AttentionModuleMixin))}
    return found


class _Clock(ModelHook):
    """Gives caches the scheduler's timestep of the call under way.

    The timestep is infinite at a run's first call, so that no cache has begun: FasterCache would
    read an empty cache if a sampler of few steps starts late enough.
    """

    _is_stateful = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._backbone = backbone
        self._names = parameters(backbone.model)
        self._first = True
        self._now = math.inf

    def timestep(self) -> float:
        """Return the timestep."""
        return self._now

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Read the timestep, which is the same for all samples of a run."""
        call = dict(zip(self._names, args, strict=False)) | kwargs
        given = torch.as_tensor(self._backbone.timestep(call)).flatten()[0].item()
        self._now = math.inf if self._first else self._backbone.scheduler_timestep(given)
        self._first = False
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Begin a run."""
        self._first = True
        return module


class _HalvesExchanged(ModelHook):
    """Gives FasterCache the guided half of a batch last, as it expects."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Swap the halves of arguments with a row for every sample."""
        return args, {k: _exchanged(v) if k in self._names else v for k, v in kwargs.items()}

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Swap the prediction's halves."""
        return (_exchanged(output[0]), *output[1:])


def _exchanged(value: torch.Tensor) -> torch.Tensor:
    first, second = value.chunk(2)
    return torch.cat([second, first])


def _hook(model: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(model).register_hook(hook, type(hook).__name__)
