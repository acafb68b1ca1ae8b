"""UNets: schedules on diffusers' own networks, of which attention and middle block can go."""

import copy
from itertools import pairwise

import pytest
import torch
from families import close, draws, gradients, randomized, row, same_gradients, traces
from torch import nn

from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError
from accelkit.runtime.switch import disable, enable, enabled_on
from accelkit.runtime.taps import Taps

SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4}


def plain(**options):
    """Attention on either side of the middle block: five counted blocks."""
    from diffusers import UNet2DModel

    settings = {
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**SMALL, **settings, **options})


def conditional(**options):
    """One transformer block on the way down, the middle block, and two of two on the way up."""
    from diffusers import UNet2DConditionModel

    settings = {
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**SMALL, **settings, **options})


# kind: network, its counted blocks by name in the order in which they run
KINDS = {
    "plain": (
        plain,
        [
            "down_blocks.1.attentions.0",
            "mid_block",
            "up_blocks.0.attentions.0",
            "up_blocks.0.attentions.1",
        ],
    ),
    "conditional": (
        conditional,
        [
            "down_blocks.0.attentions.0.transformer_blocks.0",
            "mid_block",
            "up_blocks.1.attentions.0.transformer_blocks.0",
            "up_blocks.1.attentions.1.transformer_blocks.0",
        ],
    ),
}


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return randomized(KINDS[kind][0])


def inputs(kind, timestep=(100, 900, 500, 100)):
    draw, batch = draws(), len(timestep)
    call = {"sample": draw(batch, 3 if kind == "plain" else 4, 8, 8)}
    if kind != "plain":
        call["encoder_hidden_states"] = draw(batch, 5, 6)
    return call | {"timestep": torch.tensor(timestep)}


class Pass(nn.Module):
    def forward(self, hidden_states, *_, **__):
        return hidden_states


def cut(model, kind, depth):
    """The network in which modules that hand on what they get stand for all but ``depth``."""
    short = copy.deepcopy(model)
    for name in KINDS[kind][1][depth:]:
        parent, _, child = name.rpartition(".")
        holder = short.get_submodule(parent)
        twin = Pass()
        if name == "mid_block":  # which the network asks whether it takes text
            twin.has_cross_attention = getattr(short.mid_block, "has_cross_attention", False)
        setattr(holder, child, twin)
    return short


SCHEDULE, DEPTHS = "4@0.3,2@0.6,1@1", (4, 1, 2, 4)


def by_hand(model, kind, call, depths=DEPTHS):
    with torch.no_grad():
        return torch.cat(
            [
                cut(model, kind, d)(**{k: row(v, i) for k, v in call.items()}).sample
                for i, d in enumerate(depths)
            ]
        )


def test_what_keeps_the_shape_is_counted_as_it_runs(model, kind):
    backbone = backbone_of(model)
    names = {module: name for name, module in model.named_modules()}
    assert [names[block] for block in backbone.blocks] == KINDS[kind][1]
    ran = []
    for block in backbone.blocks:
        block.register_forward_pre_hook(lambda module, _: ran.append(names[module]))
    model(**inputs(kind))
    assert ran == KINDS[kind][1]


@torch.no_grad()
def test_full_hooks_nothing_and_changes_no_bit(model, kind):
    call = inputs(kind)
    output = model(**call).sample
    with enable(model, "full"):
        assert not any("_diffusers_hook" in vars(m) for m in model.modules())
        assert torch.equal(model(**call).sample, output)


@torch.no_grad()
def test_a_depth_is_the_network_without_the_last_of_them(model, kind):
    call = inputs(kind)
    outputs = [cut(model, kind, depth)(**call).sample for depth in range(5)]
    for depth, expected in enumerate(outputs):
        with enable(model, f"uniform:{depth}"):
            assert torch.equal(model(**call).sample, expected)
    for a, b in pairwise(outputs):
        assert (a - b).abs().max() > 1e-4 * b.abs().max()


@torch.no_grad()
def test_disabled_again_nothing_is_left(model, kind):
    call = inputs(kind)
    before, keys, output = traces(model), list(model.state_dict()), model(**call).sample
    enable(model, SCHEDULE)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(**call).sample, output)
    disable(model)
    assert traces(model) == before
    assert torch.equal(model(**call).sample, output)
    assert enabled_on(model) is None


@torch.no_grad()
def test_rows_of_a_mixed_batch_equal_single_calls(model, kind):
    call = inputs(kind)
    expected = by_hand(model, kind, call)
    with enable(model, SCHEDULE):
        close(model(**call).sample, expected)
        for i in range(4):
            single = {k: row(v, i) for k, v in call.items()}
            close(model(**single).sample, expected[i : i + 1])
            single["timestep"] = int(call["timestep"][i])  # as plain numbers are taken too
            close(model(**single).sample, expected[i : i + 1])


@torch.no_grad()
def test_a_mixed_batch_is_one_pass_for_each_depth(model, kind):
    seen = []
    model.conv_in.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with enable(model, SCHEDULE):
        model(**inputs(kind))
        assert seen == [2, 1, 1]
        model(**inputs(kind, (100, 100, 100)))
        assert seen[3:] == [3]


@torch.no_grad()
def test_both_call_styles(model, kind):
    call = inputs(kind)
    args = [call["sample"], call["timestep"], *list(call.values())[1:-1]]
    with enable(model, SCHEDULE):
        assert torch.equal(model(*args).sample, model(**call).sample)
        assert torch.equal(model(*args, return_dict=False)[0], model(**call).sample)


def test_gradients_with_and_without_checkpointing(model, kind):
    call = inputs(kind)
    total = {}
    for i, depth in enumerate(DEPTHS):
        single = {k: row(v, i) for k, v in call.items()}
        for name, gradient in gradients(cut(model, kind, depth), single).items():
            total[name] = total.get(name, 0) + gradient
    with enable(model, SCHEDULE):
        same_gradients(gradients(model, call), total)
        model.enable_gradient_checkpointing()
        same_gradients(gradients(model, call), total)


@pytest.mark.parametrize(
    ("kind", "down", "up"),
    [
        ("plain", "AttnDownBlock2D", "UpBlock2D"),
        ("conditional", "CrossAttnDownBlock2D", "UpBlock2D"),
    ],
)
@torch.no_grad()
def test_compiled_there_is_one_graph_for_each_depth(kind, down, up):
    """Of one resolution, as tracing convolutions takes long: an attention and the middle block."""
    torch._dynamo.reset()
    graphs, sizes = [], {"block_out_channels": (8,), "down_block_types": (down,)}
    if kind == "conditional":
        sizes["transformer_layers_per_block"] = 1
    model = randomized(lambda: KINDS[kind][0](**sizes, up_block_types=(up,)))

    def counting(module, _):
        graphs.append(module)
        return module.forward

    calls = [inputs(kind, t) for t in ((100, 100), (900, 900))]
    expected = [model(**calls[0]).sample]
    model.mid_block, middle = None, model.mid_block  # the second of two
    expected.append(model(**calls[1]).sample)
    model.mid_block = middle
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    with enable(compiled, "2@0.3,1@1"):
        for call, output in zip(calls, expected, strict=True):
            close(compiled(**call).sample, output)
            compiled(**call | {"timestep": call["timestep"] + 10})
    assert len(graphs) == 2
    torch._dynamo.reset()


@torch.no_grad()
def test_labels_move_with_their_samples():
    model = randomized(lambda: plain(num_class_embeds=4))
    call = inputs("plain") | {"class_labels": torch.tensor([3, 1, 2, 0])}
    assert backbone_of(model).num_classes == 4
    expected = by_hand(model, "plain", call)
    with enable(model, SCHEDULE):
        close(model(**call).sample, expected)


@torch.no_grad()
def test_residuals_of_a_controlnet_move_with_their_samples():
    model = randomized(conditional)
    call, draw = inputs("conditional"), draws(3)
    shapes = [(8, 8), (8, 8), (8, 4), (16, 4)]
    call["down_block_additional_residuals"] = tuple(draw(4, c, s, s) for c, s in shapes)
    call["mid_block_additional_residual"] = draw(4, 16, 4, 4)
    without = by_hand(model, "conditional", inputs("conditional"))
    expected = by_hand(model, "conditional", call)
    assert not torch.allclose(expected, without)
    with enable(model, SCHEDULE):
        close(model(**call).sample, expected)
    convolutions = cut(model, "conditional", 0)(**call).sample
    with enable(model, "uniform:0"):
        assert torch.equal(model(**call).sample, convolutions)


@torch.no_grad()
def test_other_kinds_of_attention():
    from diffusers import UNet2DConditionModel

    model = randomized(
        lambda: UNet2DConditionModel(
            **SMALL,
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=6,
            down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        )
    )
    call = inputs("conditional")
    blocks = [type(b).__name__ for b in backbone_of(model).blocks]
    assert blocks == ["Attention", "UNetMidBlock2DSimpleCrossAttn", "Attention", "Attention"]
    output = model(**call).sample
    with enable(model, "uniform:0"):
        assert output.shape == model(**call).sample.shape
        assert not torch.allclose(model(**call).sample, output)


def test_a_pipeline():
    from diffusers import DDIMPipeline, DDIMScheduler

    model = randomized(plain)
    pipe = DDIMPipeline(model, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    ran = []
    for block in backbone_of(model).blocks:
        layer = next(m for m in block.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
        layer.register_forward_pre_hook(lambda *_: ran.append(1))
    with enable(pipe, SCHEDULE) as state:
        assert state.schedule.family == "unet"
        pipe(num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    # at 900, 800, 700 and 600 one runs, at 500, 400 and 300 two do, below all four
    assert len(ran) == 4 * 1 + 3 * 2 + 3 * 4
    with enable(pipe, "D4"):
        pass


def test_what_cannot_be_done_is_said():
    bare = plain(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
    )
    with pytest.raises(AccelkitError, match="this UNet2DModel has no attention and no middle"):
        enable(bare, "full")
    for model in (conditional(), plain()):
        with pytest.raises(AccelkitError, match="tokens cannot be merged in a unet"):
            enable(model, "tome:0.3")
    with (
        enable(model, SCHEDULE) as state,
        pytest.raises(AccelkitError, match="a unet cannot be supervised on the way"),
    ):
        Taps(state)
    with pytest.raises(AccelkitError, match="depth 5 is above the model's 4 blocks"):
        enable(model, "uniform:5")
