"""A schedule beside caches on the same model, whichever comes first."""

import copy
import inspect

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from plain import enable
from text_pipes import filled

from accelkit.errors import AccelkitError
from accelkit.runtime.switch import disable, enabled_on

SCHEDULE = "6@0.3,4@0.6,2@1"  # of the six blocks of `dit`
STEPS = [900, 800, 700, 500, 450, 400, 350, 200, 100]
DEPTHS = [2, 2, 2, 4, 4, 4, 4, 6, 6]
MERGED = "6+tome:0.5@1"


def inputs(timestep, batch=2):
    torch.manual_seed(timestep)
    labels = torch.arange(batch)
    return torch.randn(batch, 4, 8, 8), torch.full((batch,), timestep), labels


@torch.no_grad()
def run(model, timestep=900, batch=2):
    latents, t, y = inputs(timestep, batch)
    return model(latents, timestep=t, class_labels=y).sample


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def cut(model, depth):
    """The network with its first blocks; what others hooked on them stays."""
    blocks = list(model.transformer_blocks)
    model.transformer_blocks = torch.nn.ModuleList(blocks[:depth])
    return blocks


class Sampling:
    """Steps of a model, at which caches keep what they keep."""

    now = 0

    def timestep(self):
        return self.now

    def outputs(self, model, depths=None):
        """Return the output of every step, by hand with the block list cut if depths are given."""
        found = []
        for i, self.now in enumerate(STEPS):
            _set_cache_context(model, CacheContext("cond"))
            blocks = cut(model, depths[i]) if depths else None
            try:
                found.append(run(model, self.now))
            finally:
                if blocks:
                    model.transformer_blocks = torch.nn.ModuleList(blocks)
        return torch.stack(found)


@pytest.fixture
def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 2, 2),
    )
    return filled(model, 0.2)


def flux_call():
    torch.manual_seed(3)
    return {
        "hidden_states": torch.randn(2, 6, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.full((2,), 0.9),
        "img_ids": torch.arange(18).view(6, 3) % 4,
        "txt_ids": torch.zeros(5, 3),
    }


# --- diffusers' caches -----------------------------------------------------------------------


def pyramid(model, sampling):
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=sampling.timestep,
    )
    diffusers.apply_pyramid_attention_broadcast(model, config)


def taylor(model, _, identifiers=(r"^transformer_blocks\.\d\.attn1$",)):
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=list(identifiers)
    )
    diffusers.apply_taylorseer_cache(model, config)


def taylor_of_blocks(model, _):
    taylor(model, _, [r"^transformer_blocks\.\d$"])


def layer_skip(model, _):
    config = diffusers.LayerSkipConfig(indices=[1, 2, 4], fqn="transformer_blocks")
    diffusers.hooks.apply_layer_skip(model, config)


def first_block(model, _):
    diffusers.apply_first_block_cache(model, diffusers.FirstBlockCacheConfig(threshold=10.0))


def mag(model, _):
    ratios = torch.ones(len(STEPS))
    config = diffusers.MagCacheConfig(num_inference_steps=len(STEPS), mag_ratios=ratios)
    diffusers.apply_mag_cache(model, config)


def faster(model, sampling):
    config = diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 850),
        tensor_format="BCHW",
        is_guidance_distilled=True,
        current_timestep_callback=sampling.timestep,
    )
    diffusers.apply_faster_cache(model, config)


CACHES = [pyramid, taylor, taylor_of_blocks, layer_skip, first_block, mag, faster]


def both(model, schedule, cache, first):
    """A schedule and a cache on the same model."""
    sampling = Sampling()
    if first == "cache":
        cache(model, sampling)
    enable(model, schedule)
    if first == "schedule":
        cache(model, sampling)
    return sampling


@pytest.mark.parametrize("first", ["cache", "schedule"])
@pytest.mark.parametrize(
    ("cache", "schedule", "depths"),
    [
        (pyramid, SCHEDULE, DEPTHS),
        (taylor, SCHEDULE, DEPTHS),
        (layer_skip, SCHEDULE, DEPTHS),
        (faster, "uniform:4", [4] * 9),
    ],
)
def test_caches_within_blocks_work_as_in_the_network_cut_at_every_step(
    make_dit, cache, schedule, depths, first
):
    sampling, by_hand = Sampling(), make_dit()
    cache(by_hand, sampling)
    expected = sampling.outputs(by_hand, depths)
    without, model = Sampling().outputs(make_dit(), depths), make_dit()
    found = both(model, schedule, cache, first).outputs(model)
    close(found, expected)
    assert (expected - without).abs().max() > 1e-3  # the cache was in use


@pytest.mark.parametrize(
    ("cache", "schedule", "message"),
    [
        (first_block, SCHEDULE, "FirstBlockCache, which keeps what all blocks add"),
        (first_block, "uniform:4", "FirstBlockCache"),
        (mag, SCHEDULE, "MagCache"),
        (faster, SCHEDULE, "FasterCache, which needs every block from the first step on"),
        (taylor_of_blocks, SCHEDULE, "TaylorSeer on whole blocks"),
    ],
)
def test_caches_of_runs_of_blocks_are_refused(make_dit, cache, schedule, message):
    model = make_dit()
    cache(model, Sampling())
    with pytest.raises(AccelkitError, match=message):
        enable(model, schedule)
    assert enabled_on(model) is None

    model = make_dit()
    sampling = both(model, schedule, cache, "schedule")
    for _ in range(2):
        with pytest.raises(AccelkitError, match=message):
            sampling.outputs(model)
    for module in model.modules():  # the cache taken off again
        for name in list(getattr(module, "_diffusers_hook", HookRegistry(module)).hooks):
            if not name.startswith("accelkit"):
                module._diffusers_hook.remove_hook(name, recurse=False)
    short = make_dit()
    cut(short, enabled_on(model).schedule.depth_at(0.9))
    close(run(model), run(short))


@pytest.mark.parametrize("cache", [first_block, mag])
def test_caches_of_runs_of_blocks_run_with_token_merging_alone(make_dit, cache):
    model = make_dit()
    enable(model, MERGED)
    merged = Sampling().outputs(model)
    found = []
    for first in ("cache", "schedule"):
        model = make_dit()
        found.append(both(model, MERGED, cache, first).outputs(model))
    close(*found)
    close(found[0][0], merged[0])  # nothing is kept yet
    assert (found[0] - merged).abs().max() > 1e-3


def test_attention_that_is_kept_is_kept_for_all_tokens(make_dit):
    """Merged tokens would be told apart again by another step's matching."""
    model = make_dit()
    pyramid(model, Sampling())
    with pytest.raises(AccelkitError, match="would keep what attention returns for merged tokens"):
        enable(model, MERGED)
    model = make_dit()
    sampling = both(model, MERGED, pyramid, "schedule")
    found = sampling.outputs(model)

    kept = {}  # by hand: attention with merging, every second one the one before
    model = make_dit()
    enable(model, MERGED)
    for block in model.transformer_blocks:
        forward = block.attn1.forward

        def every_second(*args, forward=forward, block=block, **kwargs):
            count, last = kept.get(block, (0, None))
            output = forward(*args, **kwargs) if count % 2 == 0 else last
            kept[block] = (count + 1, output)
            return output

        block.attn1.forward = every_second
    close(found, Sampling().outputs(model))


def test_a_full_schedule_minds_no_cache(make_dit):
    for cache in CACHES:
        model, other = make_dit(), make_dit()
        sampling = both(model, "full", cache, "cache")
        found = sampling.outputs(model)
        cache(other, sampling)
        assert torch.equal(found, sampling.outputs(other))


@pytest.mark.parametrize("cache", [pyramid, taylor])
def test_mixed_depths_are_refused_where_something_keeps_states(dit, cache):
    both(dit, SCHEDULE, cache, "schedule")
    latents, _, y = inputs(0)
    with pytest.raises(AccelkitError, match="a batch of mixed depths cannot run with"):
        dit(latents, timestep=torch.tensor([100, 900]), class_labels=y)


@torch.no_grad()
def test_an_enabled_cache_of_diffusers_own_call(flux):
    enable(flux, "3@0.5,1@1")
    flux.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(AccelkitError, match="FirstBlockCache"), flux.cache_context("cond"):
        flux(**flux_call())
    flux.disable_cache()
    output = flux(**flux_call()).sample
    disable(flux)
    flux.transformer_blocks, flux.single_transformer_blocks = (
        flux.transformer_blocks[:1],
        torch.nn.ModuleList(),
    )
    close(output, flux(**flux_call()).sample)


# --- cache-dit -------------------------------------------------------------------------------


def test_cache_dit_is_told_by_its_mark(dit):
    enable(dit, SCHEDULE)
    dit._is_cached = True
    with pytest.raises(AccelkitError, match="cannot run with cache-dit"):
        run(dit)
    disable(dit)
    with pytest.raises(AccelkitError, match=r"cache_dit\.disable_cache"):
        enable(dit, SCHEDULE)
    enable(dit, "full")


@pytest.mark.parametrize("first", ["cache-dit", "schedule"])
def test_cache_dit(flux, first):
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    pattern = cache_dit.ForwardPattern.Pattern_1
    adapter = cache_dit.BlockAdapter(
        transformer=flux, blocks=[flux.transformer_blocks], forward_pattern=[pattern]
    )
    if first == "schedule":
        enable(flux, "2@1")
    cache_dit.enable_cache(adapter, cache_config=cache_dit.DBCacheConfig(num_inference_steps=4))
    with pytest.raises(AccelkitError, match="cache-dit"):
        enable(flux, "2@1") if first == "cache-dit" else flux(**flux_call())


@pytest.mark.parametrize("first", ["cache-dit", "schedule"])
def test_cache_dit_and_a_schedule_are_disabled_in_any_order(flux, first):
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    call, before = flux_call(), set(vars(flux))
    with torch.no_grad():
        plain = flux(**call).sample
    enable(flux, "uniform:2")
    adapter = cache_dit.BlockAdapter(
        transformer=flux,
        blocks=[flux.transformer_blocks],
        forward_pattern=[cache_dit.ForwardPattern.Pattern_1],
    )
    cache_dit.enable_cache(adapter, cache_config=cache_dit.DBCacheConfig(num_inference_steps=4))
    with pytest.raises(AccelkitError, match="cannot run with cache-dit"):
        flux(**call)
    for name in (first, "schedule" if first == "cache-dit" else "cache-dit"):
        cache_dit.disable_cache(adapter) if name == "cache-dit" else disable(flux)
    left = vars(flux).get("forward")
    assert left is None or left.__func__ is type(flux).forward  # cache-dit's way to put it back
    assert set(vars(flux)) - before <= {"forward"}
    with torch.no_grad():
        assert torch.equal(flux(**call).sample, plain)
        enable(flux, "uniform:2")
        shallow = flux(**call).sample
    disable(flux)
    assert not torch.equal(shallow, plain)


def test_binding_a_hooked_forward_anew_keeps_it_and_the_hooks_around_it(flux):
    """As cache-dit does; what another hook put around ours is not ours."""
    takes = inspect.signature(flux.forward)
    enable(flux, "uniform:2")
    inner = flux.forward
    assert inner.__get__(flux) is inner
    assert inspect.signature(inner) == takes
    copy.deepcopy(inner)
    HookRegistry.check_if_exists_or_initialize(flux).register_hook(ModelHook(), "another")
    assert getattr(flux.forward, "__get__", lambda _: flux.forward)(flux) is flux.forward
