"""Methods of a comparison: how they are written, what they do to a pipeline, and undoing them."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from counting import TEN, counted, same, sample, traces
from diffusers import DDIMScheduler, DiTPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import DiT
from text_pipes import make

from accelkit.bench import methods as module
from accelkit.bench.baselines.registry import BASELINES
from accelkit.bench.baselines.trials import Unavailable
from accelkit.bench.methods import FEWER, Method, applied, check, fewer_steps, parse_methods
from accelkit.compute import Compute
from accelkit.cost import macs
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.runtime.switch import enable, enabled_on
from accelkit.sample.samplers import make_sampler
from accelkit.schedule import Schedule

LADDER = "6@0.3,4@0.6,2@1"  # of the six blocks of `dit`
DEPTHS = [2] * 4 + [4] * 3 + [6] * 3  # at the timesteps 900, 800, ... 0


def one(text, model) -> Method:
    [method] = parse_methods(f"{text};", model)
    return method


# --- how methods are spelled -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "schedule", "rest"),
    [
        ("full", "full", "full", {}),
        ("uniform:6", "full", "full", {}),
        ("D4", "schedule", "D4", {}),
        (LADDER, "schedule", LADDER, {}),
        ("dvd-2p:threshold=0.6,depth=3", "schedule", "dvd-2p:threshold=0.6,depth=3", {}),
        ("tome:0.3:B4", "baseline", "full+tome:0.3:B4", {}),
        ("tome:0.3+D4", "combination", "D4+tome:0.3", {}),
        ("6+tome:0.5@0.5,3@1", "combination", "6+tome:0.5@0.5,3@1", {}),
        ("pab", "baseline", "full", {"baseline": "pab", "options": {"interval": 2}}),
        (
            "taylorseer:4:blocks+uniform:6",
            "baseline",
            "full",
            {"baseline": "taylorseer", "options": {"interval": 4, "what": "blocks"}},
        ),
        (
            f"{LADDER}+First_Block_Cache:0.1",
            "combination",
            LADDER,
            {"baseline": "first_block_cache", "options": {"threshold": 0.1}},
        ),
        ("compile", "baseline", "full", {"compile": "inductor"}),
        ("compile:aot_eager+D4", "combination", "D4", {"compile": "aot_eager"}),
        ("compile:graphs", "baseline", "full", {"compile": "graphs"}),
        ("eager", "baseline", "full", {"eager": True}),
        ("D4+Eager", "combination", "D4", {"eager": True}),
        ("eager+pab", "baseline", "full", {"baseline": "pab", "options": {"interval": 2}}),
        ("eager+compile", "baseline", "full", {"compile": "inductor"}),
        ("steps:20", "baseline", "full", {"steps": 20}),
        ("steps", "baseline", "full", {"steps": FEWER}),
        ("steps:7 + pab + compile:eager", "combination", "full",
         {"steps": 7, "compile": "eager", "baseline": "pab", "options": {"interval": 2}}),
    ],
)  # fmt: skip
def test_a_method_is_its_parts(dit, text, kind, schedule, rest):
    method = one(text, dit)
    assert method == Method(text, Schedule.parse(schedule, 6), **rest)
    assert (method.name, method.kind) == (text, kind)


@settings(max_examples=30, deadline=None)
@given(st.permutations(["D4", "tome:0.3", "pab:3", "compile:eager", "steps:20"]), st.data())
def test_parts_stand_in_any_order(parts, data):
    some = parts[: data.draw(st.integers(1, 5))]
    assert parse_methods("+".join(some), SIX) == parse_methods("+".join(sorted(some)), SIX)


class _Six(torch.nn.Module):
    transformer_blocks = [None] * 6


SIX = type("DiTTransformer2DModel", (_Six,), {})()


def test_methods_stand_between_commas_or_semicolons(dit):
    names = [m.name for m in parse_methods("D4, pab:3,dvd-2p:threshold=0.6,depth=3 ,tome:0.3", dit)]
    assert names == ["D4", "pab:3", "dvd-2p:threshold=0.6,depth=3", "tome:0.3"]
    names = [m.name for m in parse_methods(f"{LADDER}; {LADDER}+compile ;D4", dit)]
    assert names == [LADDER, f"{LADDER}+compile", "D4"]
    assert parse_methods("", dit) == []


def test_what_does_the_same_is_one_method(dit):
    text = "D4,d4,D1,full,uniform:6,pab,pab:2,PAB:3,D4+pab,pab+D4,steps:9,steps:09,steps"
    names = [method.name for method in parse_methods(text, dit)]
    assert names == ["D4", "D1", "full", "pab", "PAB:3", "D4+pab", "steps:9", "steps"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("first_blok_cache", "unknown method 'first_blok_cache'; nearest first: first_block_cache"),
        ("D4+cache_dit", "unknown method 'cache_dit'; nearest first: cache-dit"),
        ("complie:eager", "nearest first: compile"),
        ("D44", "unknown method 'D44'; nearest first: D4"),
        ("D1+D4", "'D1[+]D4' has both D1 and D4; a method has one of a kind"),
        ("tome:0.3+tome:0.5", "has both tome:0.3 and tome:0.5"),
        ("pab+mag_cache", "'pab[+]mag_cache' has pab and mag_cache"),
        ("compile+compile:eager", "has inductor and compile:eager"),
        ("steps:3+steps:4", "has 3 and steps:4"),
        ("compile:induktor", "no backend 'induktor'; nearest first: inductor"),
        ("steps:0", "write steps:20 for 20 steps"),
        ("steps:-3", "write steps:20 for 20 steps"),
        ("D4+steps", "write steps:20 for 20 steps"),
        ("tome:2", "a merge ratio is above 0 and at most 0.75"),
        ("7@1", "depth 7 is above the model's 6 blocks"),
        ("D4+", "cannot read|unknown"),
        ("missing.toml", "no schedule file at missing.toml"),
    ],
)
def test_what_cannot_be_read_is_the_users_error(dit, text, message):
    with pytest.raises(AccelkitError, match=message) as raised:
        parse_methods(text, dit)
    assert raised.type is AccelkitError


# --- fewer steps -----------------------------------------------------------------------------


def levels(pipe, steps):
    sampler = make_sampler("ddim", pipe.scheduler, steps)
    return NoiseAxis.of(sampler).levels(sampler.timesteps)


@pytest.fixture(scope="module")
def dit_pipe():
    return DiTPipeline(DiT().make(), None, DDIMScheduler(clip_sample=False))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 250), st.data())
def test_fewer_steps_cost_what_the_schedule_does(dit_pipe, steps, data):
    model, visited = dit_pipe.transformer, levels(dit_pipe, steps)
    depths = [data.draw(st.integers(1, 6)) for _ in range(2)]
    text = f"{depths[0]}@0.5,{depths[1]}@1"
    schedule = Schedule.parse(text, 6)
    found = fewer_steps(parse_methods(f"{text};steps", model), steps, model, visited)
    full = macs(model, Compute(6))
    spent = sum(macs(model, schedule.at(level)) for level in visited)
    names = [method.name for method in found]
    if names == [text]:  # as many as the sampler's own
        assert steps == 1 or abs(steps * full - spent) <= full / 2
        return
    assert names == [text, f"steps:{found[1].steps}"]
    assert found[1].schedule.full
    assert 1 <= found[1].steps < steps
    assert found[1].steps == 1 or abs(found[1].steps * full - spent) <= full / 2


def test_every_schedule_has_its_number_of_steps_once(pipe):
    model = pipe.transformer
    text = "full,D1,uniform:3,steps,uniform:3+pab,tome:0.5,D1+compile:eager,steps:5"
    found = fewer_steps(parse_methods(text, model), 10, model, levels(pipe, 10))
    full = macs(model, Compute(6))
    half = 10 * macs(model, Compute(3)) / full
    first = 10 * Schedule.parse("D1", 6).mean(lambda c: macs(model, c), levels(pipe, 10)) / full
    counts = list(dict.fromkeys(round(each) for each in (first, half)))
    assert [m.name for m in found] == [
        *("full", "D1", "uniform:3"),
        *(f"steps:{count}" for count in counts if count not in (5, 10)),  # which are there
        *("uniform:3+pab", "tome:0.5", "D1+compile:eager", "steps:5"),
    ]
    assert fewer_steps(found, 10, model, levels(pipe, 10)) == found
    assert found[3].sampling(TEN) == replace(TEN, steps=counts[0])
    assert found[0].sampling(TEN) is TEN


# --- what a method does to a pipeline --------------------------------------------------------


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("text", ["full", LADDER, "tome:0.5"])
def test_schedules_run_as_enable_runs_them(pipe, text, kernels):
    with enable(pipe, Schedule.parse(text, 6), kernels=kernels):
        expected = sample(pipe)
    method = one(text, pipe.transformer)
    with applied(pipe, method, TEN, kernels):
        assert enabled_on(pipe).kernels == kernels
        assert torch.equal(sample(pipe), expected)
    check(pipe, method, TEN, kernels)
    assert enabled_on(pipe) is None


@pytest.mark.parametrize("text", ["eager", f"{LADDER}+eager"])
def test_eager_runs_the_models_own_modules(pipe, text):
    method = one(text, pipe.transformer)
    with applied(pipe, method, TEN):
        state = enabled_on(pipe)
        assert (state.kernels, state.schedule) == ("off", method.schedule)
    assert enabled_on(pipe) is None


@pytest.mark.parametrize(
    ("text", "computes"),
    [
        # an attention counts its own calls: every second one between the timesteps 800 and 100
        ("pab", lambda nth, step: not 1 < step < 8 or nth % 2 == 0),
        # its first three calls, then every fifth from the fifth on
        ("taylorseer", lambda nth, step: nth < 3 or (nth - 4) % 5 == 0),
    ],
)
def test_a_cache_within_blocks_and_a_schedule_take_effect_together(pipe, text, computes):
    ran = [[step for step, depth in enumerate(DEPTHS) if block < depth] for block in range(6)]
    calls = [sum(computes(nth, step) for nth, step in enumerate(steps)) for steps in ran]
    method = one(f"{LADDER}+{text}", pipe.transformer)
    before = traces(pipe.transformer)
    check(pipe, method, TEN)
    same(before, traces(pipe.transformer))
    with applied(pipe, method, TEN), counted(pipe.transformer.transformer_blocks) as seen:
        sample(pipe)
    assert [len(shapes) for shapes in seen] == calls
    assert sum(calls) < sum(DEPTHS)


def test_faster_cache_runs_with_a_schedule_of_one_depth(pipe):
    method = one("uniform:4+faster_cache", pipe.transformer)
    with applied(pipe, method, TEN), counted(pipe.transformer.transformer_blocks) as seen:
        sample(pipe)
    assert [len(shapes) for shapes in seen] == [6] * 4 + [0] * 2


def test_merging_and_a_schedule_take_effect_together(pipe):
    method = one("tome:0.5+uniform:2", pipe.transformer)
    with applied(pipe, method, TEN), counted(pipe.transformer.transformer_blocks) as seen:
        sample(pipe)
    assert seen == [[(2, 8, 32)] * 10] * 2 + [[]] * 4  # of 16 tokens


@pytest.mark.parametrize("name", ["first_block_cache:1000", "mag_cache:1000"])
def test_merging_and_a_cache_of_blocks_take_effect_together(pipe, name):
    method = one(f"tome:0.5+{name}", pipe.transformer)
    check(pipe, method, TEN)
    with applied(pipe, method, TEN), counted(pipe.transformer.transformer_blocks) as seen:
        sample(pipe)
    assert {shape for shapes in seen for shape in shapes} == {(2, 8, 32)}
    assert len(seen[5]) < 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "D4+first_block_cache",
            "cannot run with FirstBlockCache, which keeps what all blocks add",
        ),
        ("D4+mag_cache", "cannot run with MagCache"),
        ("D4+faster_cache", "cannot run with FasterCache, which needs every block from the first"),
        ("D4+taylorseer:5:blocks", "cannot run with TaylorSeer on whole blocks"),
        ("D4+cache-dit", "cannot run with cache-dit, which exchanges its blocks"),
        ("tome:0.3+cache-dit", "cannot run with cache-dit"),
        ("D4+compile:graphs", "CUDA graphs need a CUDA device"),
    ],
)
def test_parts_that_do_not_go_together_say_so(pipe, text, reason):
    if "cache-dit" in text:
        pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    before = traces(pipe.transformer)
    method = one(text, pipe.transformer)
    for attempt in (check, lambda *given: applied(*given).__enter__()):
        with pytest.raises(Unavailable, match=reason):
            attempt(pipe, method, TEN)
        same(before, traces(pipe.transformer))
        assert enabled_on(pipe) is None


def test_merging_where_it_cannot_be_says_so():
    pipe = make("hunyuan")
    with pytest.raises(Unavailable, match="tokens cannot be merged in a hunyuan"):
        check(pipe, one("tome:0.5", pipe.transformer), TEN)


# --- torch.compile ---------------------------------------------------------------------------


class Backend:
    """A backend of torch.compile's, ``counting``, that counts its graphs and runs them as are."""

    def __init__(self):
        self.graphs, self.fails = [], False

        @torch._dynamo.register_backend(name="counting")
        def compile(graph, inputs):
            if self.fails:
                raise RuntimeError("no C++ compiler")
            self.graphs.append(graph)
            return graph.forward


BACKEND = Backend()


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    BACKEND.graphs, BACKEND.fails = [], False
    yield BACKEND.graphs
    torch._dynamo.reset()


@pytest.fixture
def short(make_pipe):
    """Three blocks, which are soon compiled."""
    return make_pipe(layers=3)


@pytest.mark.parametrize(("schedule", "count"), [("full", 1), ("3@0.3,2@0.6,1@1", 3)])
def test_a_compiled_network_is_a_copy_that_is_kept(short, graphs, schedule, count):
    model, method = short.transformer, one(f"{schedule}+compile:counting", short.transformer)
    before = traces(model)
    with applied(short, one(schedule, model), TEN, "off"):
        expected = sample(short)
    for _ in range(2):  # comparisons take turns
        with applied(short, method, TEN):
            assert short.transformer is not model
            torch.testing.assert_close(sample(short), expected, atol=1e-5, rtol=1e-5)
        assert short.transformer is model
        same(before, traces(model))
        with applied(short, one(schedule, model), TEN, "off"):
            assert torch.equal(sample(short), expected)
    assert len(graphs) == count


def test_the_copy_is_on_the_same_weights(short, graphs):
    model, method = short.transformer, one("compile:counting", short.transformer)
    with applied(short, method, TEN):
        first = sample(short)
    with applied(short, one("full", model), TEN):
        sample(short)  # fused, for which the weights lie elsewhere
    with torch.no_grad():
        model.proj_out_2.bias.add_(1.0)
    expected = sample(short)
    with applied(short, method, TEN):
        found = sample(short)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - first).abs().max() > 0.1


def test_a_cache_is_compiled_with_its_network(short, graphs):
    text = "first_block_cache:1000"
    with applied(short, one(text, short.transformer), TEN):
        expected = sample(short)
    method = one(f"{text}+compile:counting", short.transformer)
    check(short, method, TEN)
    for _ in range(2):
        with applied(short, method, TEN):
            torch.testing.assert_close(sample(short), expected, atol=1e-5, rtol=1e-5)
    assert graphs


def test_what_is_compiled_goes_with_the_network(make_pipe, graphs):
    short = make_pipe(layers=3)
    gone = weakref.ref(short.transformer)
    with applied(short, one("pab+compile:counting", short.transformer), TEN):
        copy = weakref.ref(short.transformer)
    gc.collect()
    assert copy() is not None
    del short
    gc.collect()
    assert gone() is None
    assert copy() is None


@pytest.mark.gpu
def test_graphs_are_of_a_copy_that_is_kept(short):
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a CUDA device")
    short.to("cuda")
    model, method = short.transformer, one("3@0.5,1@1+compile:graphs", short.transformer)
    with applied(short, one("3@0.5,1@1", model), TEN):
        expected = sample(short)
    check(short, method, TEN)
    kept = []
    for _ in range(2):
        with applied(short, method, TEN):
            torch.testing.assert_close(sample(short), expected, atol=1e-4, rtol=1e-4)
            kept.append((short.transformer, len(enabled_on(short).fused.graphs)))
    assert kept[0] == kept[1]
    with pytest.raises(Unavailable, match="can be captured"):
        check(short, one("tome:0.5+compile:graphs", model), TEN)


def test_what_would_be_timed_without_its_graph_fails(short, graphs, monkeypatch):
    monkeypatch.setattr(module, "_MOST_GRAPHS", 1)
    with applied(short, one("compile:counting", short.transformer), TEN):
        sample(short)
        with pytest.raises(Exception, match="recompile_limit"):
            sample(short, batch=3)


def test_a_backend_that_fails_says_so(short, graphs):
    BACKEND.fails = True
    with pytest.raises(Unavailable, match=r"compile:counting cannot run on this DiT.*C[+][+] comp"):
        check(short, one("compile:counting", short.transformer), TEN)


def test_a_network_with_hooks_is_not_copied(pipe):
    pipe.transformer.transformer_blocks[0].forward = pipe.transformer.transformer_blocks[0].forward
    with pytest.raises(Unavailable, match=r"cannot copy this .* has a hook"):
        check(pipe, one("compile:eager", pipe.transformer), TEN)


# --- whose error it is -----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["full", "D4", "pab"])
def test_a_sampler_that_cannot_be_is_the_users_error(pipe, text):
    with pytest.raises(AccelkitError, match="does not follow the process") as raised:
        check(pipe, one(text, pipe.transformer), replace(TEN, sampler="flow"))
    assert raised.type is AccelkitError


def test_an_error_of_full_depth_is_no_row(pipe, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "generate_latents", broken)
    for text in ("full", "D4", "tome:0.5"):
        with pytest.raises(RuntimeError, match="a bug"):
            check(pipe, one(text, pipe.transformer), TEN)
    with pytest.raises(Unavailable, match=r"pab cannot run .*\(RuntimeError: a bug\)"):
        check(pipe, one("pab", pipe.transformer), TEN)


def test_a_check_runs_as_far_as_caches_begin(pipe, monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "generate_latents", lambda pipe, items, seeds, how: seen.append((items, how))
    )
    for steps in (50, 4):
        check(pipe, one("pab", pipe.transformer), replace(TEN, steps=steps))
    assert seen == [([0, 1], replace(TEN, steps=10)), ([0, 1], replace(TEN, steps=4))]


def test_every_cache_is_spelled_as_its_key(dit):
    assert [m.baseline for m in parse_methods(",".join(BASELINES), dit)] == list(BASELINES)
