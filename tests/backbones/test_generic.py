"""Transformers without a family of their own: found by watching a call, compared with cut ones."""

import copy
import inspect
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import text_pipes
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from families import close, draws, gradients, randomized, row, same_gradients, traces
from torch import nn

import accelkit
from accelkit.backbones import backbone_of, registry
from accelkit.backbones.example import Design, lists_of
from accelkit.backbones.generic import Generic, _found, find
from accelkit.errors import AccelkitError
from accelkit.runtime.switch import disable, enable, enabled_on

SCHEDULE = "4@0.3,3@0.6,1@1"


def networks():
    """Per network: how to build it, inputs of a batch, its lists, exit, states, and what t is."""
    import diffusers as d

    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    maps = {"in_channels": 4, "out_channels": 4}
    draw = draws()

    def text(batch, width=12):
        return draw(batch, 5, width)

    def mask(batch):
        return torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])[torch.arange(batch) % 2]

    pair = ("encoder_hidden_states", "hidden_states")
    cases = {
        "AuraFlowTransformer2DModel": (
            {**heads, **maps, "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
             "joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 64},
            lambda n: {"hidden_states": draw(n, 4, 8, 8), "encoder_hidden_states": text(n)},
            {"joint_transformer_blocks": 2, "single_transformer_blocks": 2},
            None, [pair, pair, pair[1:], pair[1:]], "t / 1000",
        ),
        "CogVideoXTransformer3DModel": (
            {**heads, **maps, "num_layers": 4, "time_embed_dim": 8, "text_embed_dim": 12,
             "sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 5},
            lambda n: {"hidden_states": draw(n, 3, 4, 8, 8), "encoder_hidden_states": text(n)},
            {"transformer_blocks": 4}, "norm_final", [pair[::-1]] * 4, "t",
        ),
        "AllegroTransformer3DModel": (
            {**maps, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4,
             "cross_attention_dim": 24, "sample_width": 8, "sample_height": 8, "sample_frames": 4,
             "caption_channels": 12},
            lambda n: {"hidden_states": draw(n, 4, 2, 8, 8), "encoder_hidden_states": text(n),
                       "encoder_attention_mask": mask(n)},
            {"transformer_blocks": 4}, "norm_out", [pair[1:]] * 4, "t",
        ),
        "LTXVideoTransformer3DModel": (
            {**heads, **maps, "num_layers": 4, "cross_attention_dim": 16, "caption_channels": 12},
            lambda n: {"hidden_states": draw(n, 12, 4), "encoder_hidden_states": text(n),
                       "encoder_attention_mask": mask(n), "num_frames": 2, "height": 2, "width": 3},
            {"transformer_blocks": 4}, "norm_out", [pair[1:]] * 4, "t",
        ),
        "QwenImageTransformer2DModel": (
            {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16,
             "out_channels": 4, "num_layers": 4, "joint_attention_dim": 12,
             "axes_dims_rope": (8, 4, 4)},
            lambda n: {"hidden_states": draw(n, 12, 16), "encoder_hidden_states": text(n),
                       "encoder_hidden_states_mask": torch.ones(n, 5).bool(),
                       "img_shapes": [[(1, 3, 4)]] * n},
            {"transformer_blocks": 4}, "norm_out", [pair] * 4, "t / 1000",
        ),
        "StableAudioDiTModel": (
            {**heads, **maps, "sample_size": 8, "num_layers": 4,
             "num_key_value_attention_heads": 1, "cross_attention_dim": 10, "time_proj_dim": 8,
             "global_states_input_dim": 6, "cross_attention_input_dim": 12},
            lambda n: {"hidden_states": draw(n, 4, 8), "encoder_hidden_states": text(n),
                       "global_hidden_states": draw(n, 1, 6)},
            {"transformer_blocks": 4}, "proj_out", [pair[1:]] * 4, "t",
        ),
        "Lumina2Transformer2DModel": (
            {"in_channels": 4, "sample_size": 16, "hidden_size": 24, "num_layers": 3,
             "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
             "multiple_of": 2, "axes_dim_rope": (4, 4, 4), "axes_lens": (300, 64, 64),
             "cap_feat_dim": 12},
            lambda n: {"hidden_states": draw(n, 4, 8, 8), "encoder_hidden_states": text(n),
                       "encoder_attention_mask": torch.ones(n, 5).long()},
            {"noise_refiner": 1, "layers": 3}, None, [pair[1:]] * 4, "1 - t / 1000",
        ),
    }  # fmt: skip
    keys = ("config", "inputs", "lists", "exit", "states", "timestep")
    return {
        name: SimpleNamespace(kind=getattr(d, name), **dict(zip(keys, case, strict=True)))
        for name, case in cases.items()
    }


NETWORKS = networks()
MOMENTS = {"t": (990, 100, 775, 100), "t / 1000": (0.99, 0.1, 0.775, 0.1)}
MOMENTS["1 - t / 1000"] = tuple(1 - t for t in MOMENTS["t / 1000"])
DEPTHS = (1, 4, 3, 4)


@pytest.fixture(params=list(NETWORKS))
def case(request):
    return NETWORKS[request.param]


@pytest.fixture
def model(case):
    return randomized(lambda: case.kind(**case.config))


def mixed(case, alike=None):
    moments = MOMENTS[case.timestep]
    if alike is not None:
        moments = (moments[alike],) * 2
    return {**case.inputs(len(moments)), "timestep": torch.tensor(moments, dtype=torch.float32)}


def one(call, i):
    shared = ("img_shapes",)
    return {k: v[:1] if k in shared else row(v, i) for k, v in call.items()}


def cut(model, case, depth):
    short = copy.deepcopy(model)
    for name in case.lists:
        blocks = getattr(short, name)
        kept = min(depth, len(blocks))
        setattr(short, name, blocks[:kept])
        depth -= kept
    return short


def run(model, call):
    return model(**call, return_dict=False)[0]


def on(model, schedule=SCHEDULE):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return enable(model, schedule, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def test_what_is_found(model, case):
    backbone = backbone_of(model)
    assert isinstance(backbone, Generic)
    names = [f"{name}.{i}" for name, count in case.lists.items() for i in range(count)]
    assert list(backbone.found.blocks) == names
    assert backbone.blocks == [block for name in case.lists for block in getattr(model, name)]
    assert list(backbone.found.states) == case.states
    assert backbone.hidden == "hidden_states"
    assert backbone.exit is (model.get_submodule(case.exit) if case.exit else None)
    assert backbone.sequential == (case.exit is not None)
    notes = backbone.notes()
    assert notes["model_timestep"].split(",")[0] == case.timestep
    assert notes["block_lists"] == ", ".join(case.lists)
    at = backbone.model_timestep(torch.tensor(250.0))
    assert backbone.scheduler_timestep(float(at)) == pytest.approx(250)


@pytest.mark.parametrize("name", ["AuraFlow", "CogVideoX", "Lumina2"])
def test_a_few_blocks_tell_of_all(name):
    """Networks of dozens of blocks would take minutes to watch."""
    case = next(case for kind, case in NETWORKS.items() if kind.startswith(name))
    layers = {key: 6 for key in case.config if key in ("num_layers", "num_single_dit_layers")}
    model = case.kind(**{**case.config, **layers})
    design = Design.of(model)
    found = _found(design, short=True)
    assert found == _found(design, short=False)
    assert len(found.blocks) >= 6
    twin = design.twin(short=True)
    assert max(map(len, lists_of(twin).values())) == 3
    assert twin.lengths == {name: len(blocks) for name, blocks in lists_of(model).items()}


def test_looking_leaves_no_trace_and_finds_the_same_again(model, case):
    before, state = traces(model), {k: v.clone() for k, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    found = find.__wrapped__(Design.of(model))
    assert found == find.__wrapped__(Design.of(model))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert traces(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_full_hooks_nothing_and_changes_no_bit(model, case):
    call = mixed(case)
    output = run(model, call)
    with on(model, "full"):
        assert not any("_diffusers_hook" in vars(m) for m in model.modules())
        assert torch.equal(run(model, call), output)


@torch.no_grad()
def test_an_exit_is_the_network_cut_there(model, case):
    call = mixed(case, 0)
    outputs = [run(cut(model, case, depth), call) for depth in (1, 2, 3, 4)]
    for depth, expected in enumerate(outputs, 1):
        with on(model, f"uniform:{depth}"):
            assert torch.equal(run(model, call), expected)
    assert all((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in pairwise(outputs))


@torch.no_grad()
def test_disabled_again_nothing_is_left(model, case):
    call = mixed(case)
    before, keys, output = traces(model), list(model.state_dict()), run(model, call)
    on(model)
    assert not torch.equal(run(model, call), output)
    disable(model)
    assert traces(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, call), output)
    assert enabled_on(model) is None


@torch.no_grad()
def test_rows_of_a_mixed_batch_equal_single_calls(model, case):
    call = mixed(case)
    singles = [run(cut(model, case, d), one(call, i)) for i, d in enumerate(DEPTHS)]
    with on(model):
        close(run(model, call), torch.cat(singles))
        for i, single in enumerate(singles):
            close(run(model, one(call, i)), single)


@torch.no_grad()
@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "AuraFlowTransformer2DModel"])
def test_found_in_inference_mode(name):
    case = NETWORKS[name]
    model = case.kind(**case.config)
    expected = backbone_of(model).found
    find.cache_clear()
    with torch.inference_mode():
        assert backbone_of(model).found == expected


def test_both_call_styles(model, case):
    call = mixed(case)
    taken = list(inspect.signature(type(model).forward).parameters.values())[1:]
    args = [call.get(parameter.name, parameter.default) for parameter in taken]
    with on(model):
        output = model(**call).sample
        assert torch.equal(model(*args).sample, output)
        assert torch.equal(run(model, call), output)


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "AuraFlowTransformer2DModel"])
def test_gradients_with_and_without_checkpointing(name):
    case = NETWORKS[name]
    model = randomized(lambda: case.kind(**case.config))
    call, total = mixed(case), {}
    for i, depth in enumerate(DEPTHS):
        for key, gradient in gradients(cut(model, case, depth), one(call, i)).items():
            total[key] = total.get(key, 0) + gradient
    with on(model):
        same_gradients(gradients(model, call), total)
        model.enable_gradient_checkpointing()
        same_gradients(gradients(model, call), total)


@torch.no_grad()
def test_compiled_there_is_one_graph_for_each_depth():
    """AuraFlow has two lists of blocks and no exit, which no registered family has."""
    case = NETWORKS["AuraFlowTransformer2DModel"]
    model = randomized(lambda: case.kind(**case.config))
    torch._dynamo.reset()
    graphs = []

    def counting(module, _):
        graphs.append(module)
        return module.forward

    calls = [mixed(case, i) for i in (0, 1)]
    later = [c | {"timestep": c["timestep"] * 0.999} for c in calls]
    expected = [run(cut(model, case, d), c) for c, d in zip(calls, (1, 4), strict=True)]
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with on(compiled):
        for call, other, output in zip(calls, later, expected, strict=True):
            close(run(compiled, call), output)
            run(compiled, other)
    assert len(graphs) == 2
    torch._dynamo.reset()


@torch.no_grad()
def test_it_agrees_with_the_family_of_a_known_network(dit, monkeypatch):
    labels, t = torch.tensor([1, 2, 3, 4]), torch.tensor([900, 100, 500, 100])
    x = draws()(4, 4, 8, 8)
    real = backbone_of(dit)
    schedule = accelkit.Schedule.parse("6@0.3,4@0.6,2@1", 6)
    with enable(dit, schedule):
        expected = dit(x, t, labels).sample
    monkeypatch.delitem(registry._families, "DiTTransformer2DModel")
    found = backbone_of(dit)
    assert isinstance(found, Generic)
    assert found.blocks == list(real.blocks)
    assert found.exit is real.exit
    assert found.states == real.states
    with enable(dit, schedule):
        close(dit(x, t, labels).sample, expected)
        close(dit(x, t, class_labels=labels).sample, expected)


def test_tokens_are_not_merged():
    case = NETWORKS["AuraFlowTransformer2DModel"]
    with pytest.raises(AccelkitError, match="tokens cannot be merged in a AuraFlowTransformer2DM"):
        on(case.kind(**case.config), "tome:0.3")


def test_what_is_registered_comes_first(monkeypatch):
    case = NETWORKS["AllegroTransformer3DModel"]

    class Mine(accelkit.Backbone):
        family = "mine"
        layout = "BCFHW"
        batched = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")
        block_batched = ("encoder_hidden_states", "encoder_attention_mask", "temb", "timestep")

        @property
        def blocks(self):
            return self.model.transformer_blocks

        @property
        def exit(self):
            return self.model.norm_out

    monkeypatch.setattr(registry, "_families", dict(registry._families))
    accelkit.register_backbone(case.kind, Mine)
    model = randomized(lambda: case.kind(**case.config))
    call = mixed(case)
    with torch.no_grad():
        singles = [run(cut(model, case, d), one(call, i)) for i, d in enumerate(DEPTHS)]
        with on(model) as state:
            assert isinstance(state.backbone, Mine)
            close(run(model, call), torch.cat(singles))


class Stack(accelkit.Backbone):
    """A family as a user could write it."""

    family = "stack"

    @property
    def blocks(self):
        return self.model.transformer_blocks


def of_stack(**changes):
    return type("Stacked", (Stack,), changes)


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (of_stack(hidden="x", states=("x",)), "says that blocks take x, a LTX.* takes hidden_stat"),
        (of_stack(states=("hidden_states", "text")), "blocks take text, a LTX.* in skipped"),
        (of_stack(blocks=[]), "Stacked finds no block in this LTXVideoTransformer3DModel"),
    ],
)
def test_a_backbone_that_names_what_is_not_there_is_refused_at_once(backbone, words, monkeypatch):
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    case = NETWORKS["LTXVideoTransformer3DModel"]
    accelkit.register_backbone(case.kind, backbone)
    with pytest.raises(AccelkitError, match=words) as caught:
        enable(case.kind(**case.config), "uniform:0" if "no block" in words else "uniform:2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, Stack), "a class of models or its name, not None"),
        ((nn.Linear, dict), "a class derived from accelkit.Backbone, not <class 'dict'>"),
        ((nn.Linear, accelkit.Backbone), r"Backbone has to name its blocks \(blocks\)"),
        ((nn.Linear, of_stack(family=None)), r"and its family \(family\)"),
    ],
)
def test_what_is_no_backbone_is_not_registered(given, words):
    before = dict(registry._families)
    with pytest.raises(TypeError, match=words):
        accelkit.register_backbone(*given)
    assert registry._families == before


def test_a_timestep_for_every_token_is_refused():
    case = NETWORKS["LTXVideoTransformer3DModel"]
    model = randomized(lambda: case.kind(**case.config))
    with on(model), pytest.raises(AccelkitError, match=r"a timestep for every token, \(2, 12\)"):
        model(**case.inputs(2), timestep=torch.full((2, 12), 990.0))


@pytest.mark.parametrize("guess", [1.0, 1e-3])
def test_a_timestep_that_is_read_in_another_way_than_it_is_meant_is_noticed(guess, monkeypatch):
    """Otherwise every step would be read as one near the data and run at full depth."""
    pipe = text_pipes.make("auraflow")
    with enable(pipe, "4@0.5,2@1") as state:
        assert state.backbone.timestep_scale == 1e-3
        monkeypatch.setattr(state.backbone, "timestep_scale", guess)
        run = partial(pipe, "a", height=16, width=16, num_inference_steps=3, output_type="latent")
        if guess == 1e-3:
            run()
            mirrored = 1 - pipe.scheduler.timesteps[1:2] / 1000  # by hand, and none of the run's
            states = torch.zeros(1, 5, 16)
            pipe.transformer(torch.zeros(1, 4, 8, 8), states, mirrored)
            return
        with pytest.raises(AccelkitError, match=r"the timestep 1, .* read as t / 1000 it would be"):
            run()


def test_a_video_with_as_many_frames_as_channels():
    from diffusers import LatteTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    latte = LatteTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, sample_size=8, patch_size=2, video_length=4,
        caption_channels=12, norm_type="ada_norm_single", **sizes,
    )  # fmt: skip
    assert backbone_of(latte).depth >= 2


# --- what cannot be found out


class Block(nn.Module):
    def __init__(self, width, out=None):
        super().__init__()
        self.linear = nn.Linear(width, out or width)

    def forward(self, hidden_states, temb=None):
        return self.linear(hidden_states)


class Pair(Block):
    def forward(self, hidden_states, temb=None):
        return self.linear(hidden_states), hidden_states.sum()


class Odd(ModelMixin, ConfigMixin):
    """A network on (B, C, H, W) with one list of blocks, of the kind that a test wants."""

    @register_to_config
    def __init__(self, in_channels=4, sample_size=8, kind="narrowing"):
        super().__init__()
        widths = {"narrowing": [8, 6, 4]}.get(kind, [8, 8, 8])
        block = Pair if kind == "pair" else Block
        pairs = zip(widths, [*widths[1:], widths[-1]], strict=True)
        self.layers = nn.ModuleList(block(a, b) for a, b in pairs)
        self.head = nn.Linear(widths[-1], 8)

    def forward(self, sample, timestep, mystery=None):
        x = sample
        for _ in range(2 if self.config.kind == "twice" else 1):
            for block in self.layers:
                x = block(x)
                x = x[0] if isinstance(x, tuple) else x
        return (self.head(x),)


class Mysterious(Odd):
    def forward(self, sample, timestep, mystery):
        return super().forward(sample, timestep)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Odd(kind="narrowing"), r"layers.0 turns hidden_states of shape \(2, 4, 8, 8\) in"),
        (lambda: Odd(kind="pair"), "a Pair of its layers returns 2 values, and which arguments"),
        (lambda: Odd(kind="twice"), "its layers are 3 blocks, and a call makes 6 calls of them"),
        (lambda: Odd(in_channels=4, sample_size=5), "a sample of none of the layouts BCHW, BCFHW"),
        (Mysterious, "what mystery is to hold is not known"),
    ],
)
def test_it_says_what_it_could_not_find(build, words):
    with pytest.raises(AccelkitError, match=words) as caught:
        backbone_of(build())
    assert "accelkit.register_backbone(cls, backbone)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_networks_that_denoise_nothing():
    from diffusers import AutoencoderKL, LuminaNextDiT2DModel

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(AccelkitError, match="AutoencoderKL by itself: its forward takes no times"):
        enable(vae, "D4")
    sizes = {"hidden_size": 24, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
    lumina = LuminaNextDiT2DModel(sample_size=16, cross_attention_dim=10, **sizes)
    with pytest.raises(AccelkitError, match="what image_rotary_emb is to hold is not known"):
        enable(lumina, "D4")
    with pytest.raises(
        AccelkitError, match=r"no backbone for Linear; it knows .*register_backbone"
    ):
        enable(nn.Linear(1, 1), "D4")
