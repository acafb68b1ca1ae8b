"""Puts cache-dit's DBCache on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from accelkit.bench.baselines.trials import Unavailable
from accelkit.sample.generate import Sampling
from accelkit.subject import Subject


def cache_dit(on: Subject, sampling: Sampling, threshold: float) -> None:
    """Skip all blocks but the first few while their residual changes by less than a threshold.

    cache-dit is given the network alone, because it would change the class of a pipeline.
    """
    import cache_dit

    blocks = len(on.backbone.all_blocks)
    how = cache_dit.DBCacheConfig(
        # the library's default of 8 is meant for 50 blocks or more and may be all that a model has
        Fn_compute_blocks=min(8, max(1, blocks // 4)),
        residual_diff_threshold=threshold,
        enable_separate_cfg=False,  # guidance is the second half of one call
        num_inference_steps=sampling.calls(on),
    )
    known = cache_dit.BlockAdapterRegister.is_supported(on.model)
    cache_dit.enable_cache(on.model if known else _adapter(on), cache_config=how)


def _adapter(on: Subject) -> Any:
    """Return an adapter for a model that cache-dit does not know, if its blocks are one list."""
    from cache_dit import BlockAdapter, ForwardPattern

    states = {
        ("hidden_states",): ForwardPattern.Pattern_3,
        ("hidden_states", "encoder_hidden_states"): ForwardPattern.Pattern_0,
        ("encoder_hidden_states", "hidden_states"): ForwardPattern.Pattern_1,
    }
    pattern, blocks = states.get(on.backbone.states), on.backbone.all_blocks
    if pattern is None or not on.backbone.sequential or not isinstance(blocks, nn.ModuleList):
        raise Unavailable(
            f"cache-dit does not know {type(on.model).__name__}, and its blocks are not one list "
            "that cache-dit could be given"
        )
    return BlockAdapter(transformer=on.model, blocks=blocks, forward_pattern=pattern)
