"""Puts cache-dit's DBCache on a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from accelkit.bench.baselines.target import Target, Unavailable


def cache_dit(on: Target, threshold: float) -> None:
    """Skip the blocks behind the first few while their residual changes by less than a threshold.

    cache-dit is given the network alone: of a pipeline it would change the class.
    """
    import cache_dit

    blocks = len(on.backbone.all_blocks)
    how = cache_dit.DBCacheConfig(
        # the library's 8 are meant for 50 blocks and more, and would be all of a small model's
        Fn_compute_blocks=min(8, max(1, blocks // 4)),
        residual_diff_threshold=threshold,
        enable_separate_cfg=False,  # guidance is the second half of one call
        num_inference_steps=on.calls,
    )
    known = cache_dit.BlockAdapterRegister.is_supported(on.model)
    cache_dit.enable_cache(on.model if known else _adapter(on), cache_config=how)


def _adapter(on: Target) -> Any:
    """Return how cache-dit is to call a model it does not know, whose blocks follow one another."""
    from cache_dit import BlockAdapter, ForwardPattern

    states = {
        ("hidden_states",): ForwardPattern.Pattern_3,
        ("hidden_states", "encoder_hidden_states"): ForwardPattern.Pattern_0,
        ("encoder_hidden_states", "hidden_states"): ForwardPattern.Pattern_1,
    }
    pattern, blocks = states.get(on.backbone.states), on.backbone.all_blocks
    if pattern is None or not on.backbone.sequential or not isinstance(blocks, nn.ModuleList):
        raise Unavailable(
            f"cache-dit does not know {type(on.model).__name__}, whose blocks are not one list of "
            "those that it could be told of"
        )
    return BlockAdapter(transformer=on.model, blocks=blocks, forward_pattern=pattern)
