"""Caches of other libraries: that they do what they are there for, and leave nothing behind."""

import sys
from dataclasses import replace

import diffusers
import pytest
import torch
from counting import TEN, counted, same, sample, traces
from small_models import UViT
from text_pipes import make

from accelkit.bench.baselines.registry import BASELINES
from accelkit.bench.baselines.trials import Unavailable
from accelkit.bench.methods import Method, applied, check, parse_methods
from accelkit.errors import AccelkitError
from accelkit.models import UViTPipeline
from accelkit.runtime.switch import enabled_on
from accelkit.sample.generate import Sampling, generate

ALL = list(BASELINES)
GUIDED = replace(TEN, guidance=2.0)


def method(name, pipe) -> Method:
    if name.startswith("cache-dit"):
        pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    [found] = parse_methods(name, pipe.transformer)
    return found


# --- what is computed, of ten steps ----------------------------------------------------------

HALVES = [2, 2, 2, 1, 2, 1, 1]  # of a guided batch, where FasterCache computes attention


@pytest.mark.parametrize(
    ("name", "how", "first", "rest"),
    [
        # every second step between the timesteps 800 and 100
        ("pab", TEN, 7, 7),
        ("pab:3", TEN, 6, 6),
        # the first three steps, then every fifth from the fifth on
        ("taylorseer", TEN, 5, 5),
        ("taylorseer:5:blocks", TEN, 5, 5),
        # every second step below the timestep 681
        ("faster_cache", TEN, 6, 6),
        ("faster_cache", GUIDED, 7, 7),
        # nothing has changed by so much
        ("first_block_cache:1000", TEN, 10, 1),
        ("first_block_cache:0", TEN, 10, 10),
        # two steps, then three skipped between any two
        ("mag_cache:1000", TEN, 4, 4),
        ("mag_cache:1000", GUIDED, 4, 4),
        # all but the first quarter of the blocks, behind eight steps
        ("cache-dit:1000", TEN, 10, 8),
        ("cache-dit:0", TEN, 10, 10),
    ],
)
def test_a_cache_computes_what_its_library_says(pipe, name, how, first, rest):
    blocks = pipe.transformer.transformer_blocks
    plain = sample(pipe, how)
    with applied(pipe, method(name, pipe), how):
        assert enabled_on(pipe) is None  # no fused forward in its way
        with counted(blocks) as seen:
            images = sample(pipe, how)
        assert [len(shapes) for shapes in seen] == [first] + [rest] * 5
        assert torch.equal(sample(pipe, how), images)  # the next run begins anew
        alone = sample(pipe, how, batch=1)
    assert len(alone) == 1
    assert torch.equal(images, plain) == (rest == 10)


def test_faster_cache_leaves_out_the_half_without_guidance(pipe):
    labels = []

    def note(module, args, kwargs):
        labels.append(kwargs["class_labels"].tolist())

    block = pipe.transformer.transformer_blocks[0]
    with applied(pipe, method("faster_cache", pipe), GUIDED):
        handle = block.register_forward_pre_hook(note, with_kwargs=True)
        with counted([block]) as [shapes]:
            sample(pipe, GUIDED)
        handle.remove()
    assert [shape[0] // 2 for shape in shapes] == HALVES
    assert {tuple(each) for each in labels} == {(1000, 1000, 1, 2), (1, 2)}
    assert labels.count([1, 2]) == 6  # below the timestep 641, but for every fifth step


def test_what_faster_cache_makes_up_is_the_half_without_guidance(pipe):
    model, calls = pipe.transformer, []
    with applied(pipe, method("faster_cache", pipe), GUIDED):
        handle = model.register_forward_hook(
            lambda _, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
        )
        sample(pipe, GUIDED)
        handle.remove()
    call, found = calls[4]  # of the guided half alone, all of its attentions computed
    with torch.no_grad():
        expected = model(**call)[0]
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-5, rtol=1e-5)
    assert (found[2:] - expected[2:]).abs().max() > 0.01


def test_the_ratios_of_mag_cache_are_of_what_all_blocks_add(pipe, monkeypatch):
    given = []
    real = diffusers.hooks.MagCacheConfig

    def config(**settings):
        given.append(settings)
        return real(**settings)

    monkeypatch.setattr(diffusers.hooks, "MagCacheConfig", config)
    blocks, states, added = pipe.transformer.transformer_blocks, [], []
    blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    blocks[-1].register_forward_hook(lambda *call: added.append(call[2] - states[-1]))
    for how in (TEN, replace(TEN, steps=7), TEN):
        with applied(pipe, method("mag_cache", pipe), how):
            pass
    assert [settings.get("calibrate", False) for settings in given] == [
        *(True, False),
        *(True, False),
        False,  # known by now
    ]
    norms = torch.stack([each.norm(dim=-1) for each in added[:10]])
    by_hand = [1.0, *(norms[1:] / norms[:-1]).mean(dim=(1, 2)).tolist()]
    assert given[1]["mag_ratios"] == pytest.approx(by_hand, rel=1e-5)
    assert [len(given[i]["mag_ratios"]) for i in (1, 3, 4)] == [10, 7, 10]


# --- other families --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families():
    uvit = UViTPipeline(UViT().make(), diffusers.DDIMScheduler())
    return {name: make(name) for name in ("pixart", "sd3", "sana", "hunyuan")} | {"uvit": uvit}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("pixart", name) for name in ("first_block_cache:1000", "mag_cache:1000", *ALL[1:4])),
        *(("sd3", name) for name in ("mag_cache:1000", "cache-dit:1000", *ALL[1:4])),
        *(("sana", name) for name in ("cache-dit:1000", *ALL[1:4])),
        *(("hunyuan", name) for name in ("cache-dit:1000", *ALL[1:4])),
        ("uvit", "taylorseer"),
    ],
)
def test_caches_work_where_they_know_the_family(families, family, name):
    pipe = families[family]
    how, items = Sampling("auto", 10, 2.0).check(pipe), {"uvit": [1, 2]}.get(family, ["a", "b"])
    plain = generate(pipe, items, [0, 1], how)
    check(pipe, method(name, pipe), how)
    with applied(pipe, method(name, pipe), how):
        found = generate(pipe, items, [0, 1], how)
    assert found.shape == plain.shape
    assert (generate(pipe, items, [0, 1], how) == plain).all()


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        (
            "sana",
            "first_block_cache",
            r"cannot run on this SanaTransformer2DModel .*not registered",
        ),
        ("sana", "mag_cache", r"MagCache cannot run .*SanaTransformerBlock.* not registered"),
        ("uvit", "first_block_cache", "looks for blocks by names that a UViTTransformer2DModel"),
        ("uvit", "mag_cache", "looks for blocks by names that a UViTTransformer2DModel"),
        ("uvit", "pab", "finds nothing to cache in this UViTTransformer2DModel"),
        ("uvit", "faster_cache", "finds nothing to cache in this UViTTransformer2DModel"),
        ("uvit", "cache-dit", "cache-dit does not know UViTTransformer2DModel"),
        # only its first call shows that
        ("sd3", "first_block_cache", r"cannot run on this SD3Transformer2DModel \(TypeError"),
    ],
)
def test_caches_that_do_not_know_a_family_say_so(families, family, name, reason):
    pipe = families[family]
    before = traces(pipe.transformer)
    with pytest.raises(Unavailable, match=reason):
        check(pipe, method(name, pipe), Sampling("auto", 10).check(pipe))
    same(before, traces(pipe.transformer))


# --- nothing is left behind ------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_cache_leaves_the_model_as_it_was(pipe, name):
    model = pipe.transformer
    keep = diffusers.LayerSkipConfig(indices=[3], fqn="transformer_blocks")
    diffusers.hooks.apply_layer_skip(model, keep)  # a hook of the user's own stays
    before, plain, call = traces(model), sample(pipe), type(pipe).__call__
    for how in (TEN, GUIDED):
        with applied(pipe, method(name, pipe), how):
            sample(pipe, how)
        same(before, traces(model))
        with pytest.raises(KeyboardInterrupt), applied(pipe, method(name, pipe), how):
            raise KeyboardInterrupt
        same(before, traces(model))
    assert torch.equal(sample(pipe), plain)
    assert type(pipe).__call__ is call


# --- what is not there -----------------------------------------------------------------------


def test_a_library_that_is_not_installed_says_so(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(Unavailable, match=r"cache-dit is not installed; pip install 'accelkit\[b"):
        check(pipe, parse_methods("cache-dit", pipe.transformer)[0], TEN)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("from torch import of_a_later_release", "cache-dit cannot be imported .*of_a_later_rel"),
        ("raise OSError('libcuda.so.1 is missing')", r"\(OSError: libcuda.so.1 is missing\)"),
    ],
)
def test_a_library_whose_import_fails_says_so(pipe, tmp_path, monkeypatch, line, reason):
    (tmp_path / "cache_dit.py").write_text(line)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cache_dit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=reason):
        check(pipe, parse_methods("cache-dit", pipe.transformer)[0], TEN)


def test_a_cache_that_diffusers_does_not_have_yet_says_so(pipe, monkeypatch):
    monkeypatch.delattr(diffusers.hooks, "TaylorSeerCacheConfig")
    with pytest.raises(Unavailable, match=rf"diffusers {diffusers.__version__} has no TaylorSeer"):
        check(pipe, method("taylorseer", pipe), TEN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("first_block_cache:-0.1", "threshold of .* is a number from 0 on, got '-0.1'"),
        ("mag_cache:nan", "threshold of .* is a number"),
        ("mag_cache:inf", "threshold of .* is a number"),
        ("cache-dit:much", "threshold of .* is a number"),
        ("pab:1", "interval of .* is a whole number from 2 on, got '1'"),
        ("faster_cache:2.5", "interval of .* is a whole number"),
        ("taylorseer:5:layers", "what of .* is one of attentions, blocks, got 'layers'"),
        ("pab:2:3", "PyramidAttentionBroadcast takes interval, got '2:3'"),
    ],
)
def test_options_that_cannot_be_are_the_users_error(pipe, name, message):
    with pytest.raises(AccelkitError, match=message) as raised:
        parse_methods(name, pipe.transformer)
    assert raised.type is AccelkitError
