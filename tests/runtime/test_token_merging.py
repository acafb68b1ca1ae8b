"""Token merging in the attention of real models, with skipped blocks, and taken off again."""

import copy

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from plain import enable
from torch import nn

from accelkit.backbones import DiT
from accelkit.errors import AccelkitError
from accelkit.models.uvit import UViTTransformer2DModel
from accelkit.runtime.merging import match, merge, unmerge
from accelkit.runtime.switch import disable, enabled_on
from accelkit.schedule import Schedule

MIXED = [900, 100, 500, 100]
DEPTHS = {900: 2, 500: 4, 100: 6}  # of the literal below
LITERAL = "6@0.3,4@0.6,2@1"
VARYING = "6@0.3,4+tome:0.25:R2@0.6,4+tome:0.5@1"


def inputs(timesteps, channels=4, size=8, classes=1000, seed=1):
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(timesteps), channels, size, size, generator=draw)
    labels = torch.randint(classes, (len(timesteps),), generator=draw)
    return latents, torch.tensor(timesteps), labels


@torch.no_grad()
def run(model, latents, timesteps, labels):
    return model(latents, timestep=timesteps, class_labels=labels, return_dict=False)[0]


def alone(model, *call):
    rows = zip(*(part.split(1) for part in call), strict=True)
    return torch.cat([run(model, *row) for row in rows])


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


class Merging(nn.Module):
    """An attention between merging and unmerging, put into a network by hand."""

    def __init__(self, attention, grid, ratio, protected=0):
        super().__init__()
        self.attention, self.how = attention, (grid, ratio, protected)

    def forward(self, hidden_states, **kwargs):
        matching = match(hidden_states, *self.how)
        return unmerge(self.attention(merge(hidden_states, matching), **kwargs), matching)


def merged_dit(model, ratio, blocks, depth=None):
    """The DiT on 4 x 4 tokens with merging attentions in these blocks, cut to a depth."""
    twin = copy.deepcopy(model)
    for index in blocks:
        block = twin.transformer_blocks[index]
        block.attn1 = Merging(block.attn1, (4, 4), ratio)
    twin.transformer_blocks = twin.transformer_blocks[:depth]
    return twin


def merged_uvit(model, ratio, blocks):
    """The U-ViT on 4 x 4 tokens behind label and time, with merging attentions in these blocks."""
    twin = copy.deepcopy(model)
    every = [*twin.in_blocks, twin.mid_block, *twin.out_blocks]
    for index in blocks:
        every[index].attn = Merging(every[index].attn, (4, 4), ratio, 2)
    return twin


def tokens_seen(attentions):
    """Lists that fill with the numbers of tokens that each attention's first layer is given."""
    seen = [[] for _ in attentions]
    for index, attention in enumerate(attentions):
        layer = getattr(attention, "to_q", None) or attention.qkv
        layer.register_forward_hook(
            lambda module, args, output, index=index: seen[index].append(args[0].shape[1])
        )
    return seen


def traces(model):
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def small_uvit(layers):
    """16 patches behind label and time; half of the layers are decoder blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UViTTransformer2DModel(
            sample_size=8,
            patch_size=2,
            num_layers=layers,
            num_attention_heads=2,
            attention_head_dim=16,
            num_classes=5,
            null_class=4,
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def uvit():
    """Three decoder blocks, seven in all."""
    return small_uvit(6)


def uvit_inputs(timesteps, seed=1):
    return inputs(timesteps, channels=3, classes=5, seed=seed)


# --- on and off ------------------------------------------------------------------------------


def test_disabled_again_nothing_is_left(dit):
    call = inputs(MIXED)
    before, output = traces(dit), run(dit, *call)
    enable(dit, "D4+tome:0.5:B4")
    assert not torch.equal(run(dit, *call), output)
    disable(dit)
    assert traces(dit) == before
    assert torch.equal(run(dit, *call), output)


def test_what_merges_less_than_a_token_changes_no_bit(dit):
    call = inputs(MIXED)
    output = run(dit, *call)
    with enable(dit, "tome:0.06"):  # of 16 tokens
        assert torch.equal(run(dit, *call), output)


def test_the_more_is_merged_the_further_it_is(dit):
    call = inputs([500] * 4)
    output, distances = run(dit, *call), []
    for ratio in (0.0625, 0.25, 0.75):
        with enable(dit, f"tome:{ratio}"):
            distances.append((run(dit, *call) - output).abs().mean().item())
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize(
    ("where", "merging"),
    [
        ("", {0, 1, 2, 3, 4, 5}),
        (":F2", {0, 1}),
        (":R1", {5}),
        (":B4", {0, 1, 4, 5}),
    ],
)
def test_placements(dit, where, merging):
    call = inputs([500, 500])
    seen = tokens_seen([block.attn1 for block in dit.transformer_blocks])
    with enable(dit, f"tome:0.5{where}"):
        output = run(dit, *call)
        hooked = {n for n, m in dit.named_modules() if "_diffusers_hook" in vars(m)}
    assert seen == [[8] if index in merging else [16] for index in range(6)]
    attentions = {n for n in hooked if n.endswith("attn1")}
    assert attentions == {f"transformer_blocks.{index}.attn1" for index in merging}
    close(output, run(merged_dit(dit, 0.5, merging), *call))


# --- with depth and noise level ----------------------------------------------------------------


def test_it_composes_with_depth(dit):
    call = inputs(MIXED)
    seen = tokens_seen([block.attn1 for block in dit.transformer_blocks])
    with enable(dit, f"{LITERAL}+tome:0.5:B4"):
        output = run(dit, *call)
    assert [len(calls) for calls in seen] == [1] * 6  # one pass, which samples leave early
    rows = zip(*(part.split(1) for part in call), strict=True)
    expected = [
        run(merged_dit(dit, 0.5, {0, 1, 4, 5}, DEPTHS[int(t)]), x, t, y) for x, t, y in rows
    ]
    close(output, torch.cat(expected))


def test_it_varies_with_the_noise_level(dit):
    expected = {
        100: dit,
        500: merged_dit(dit, 0.25, {4, 5}, 4),  # the merging rear blocks are skipped
        900: merged_dit(dit, 0.5, range(6), 4),
    }
    call = inputs(MIXED)
    by_hand = torch.cat(
        [
            run(expected[int(t)], x, t, y)
            for x, t, y in zip(*(part.split(1) for part in call), strict=True)
        ]
    )
    with enable(dit, VARYING):
        close(run(dit, *call), by_hand)


@pytest.mark.parametrize("schedule", ["tome:0.5", f"{LITERAL}+tome:0.3:F3", VARYING])
@pytest.mark.parametrize("timesteps", [MIXED, [100] * 3, [900, 500]])
def test_a_rows_output_does_not_depend_on_its_batch(dit, schedule, timesteps):
    call = inputs(timesteps)
    with enable(dit, schedule):
        close(run(dit, *call), alone(dit, *call))


def test_nothing_is_drawn(dit):
    call = inputs(MIXED)
    state = torch.get_rng_state()
    with enable(dit, VARYING):
        first = run(dit, *call)
        assert torch.equal(run(dit, *call), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_that_are_not_square():
    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=8,
        use_additional_conditions=False,
    ).eval()
    latents = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    call = {
        "encoder_hidden_states": torch.ones(2, 3, 8),
        "timestep": torch.tensor([500, 500]),
        "return_dict": False,
    }
    twin = copy.deepcopy(pixart)
    for block in twin.transformer_blocks:
        block.attn1 = Merging(block.attn1, (3, 5), 0.4)
    seen = tokens_seen([block.attn1 for block in pixart.transformer_blocks])
    with torch.no_grad(), enable(pixart, "tome:0.4"):
        output = pixart(latents, **call)[0]
        close(output, twin(latents, **call)[0])
    assert seen == [[9], [9]]


# --- a family that counts only some of its blocks and has tokens before the patches -------------


@pytest.mark.parametrize(
    ("where", "merging"),
    [("", set(range(7))), (":F2", {0, 1}), (":R4", {3, 4, 5, 6}), (":B2", {0, 6})],
)
def test_placement_counts_every_block_of_a_uvit(uvit, where, merging):
    call = uvit_inputs([500, 500])
    backbone = enable(uvit, f"tome:0.5{where}").backbone
    seen = tokens_seen([attention for (attention,) in backbone.attentions()])
    output = run(uvit, *call)
    disable(uvit)
    assert seen == [[2 + 8] if index in merging else [18] for index in range(7)]
    close(output, run(merged_uvit(uvit, 0.5, merging), *call))


def test_every_noise_level_of_a_uvit_has_its_own_placement(uvit):
    call = uvit_inputs([100, 900])
    front, rear = merged_uvit(uvit, 0.5, {0, 1}), merged_uvit(uvit, 0.25, {5, 6})
    first, last = zip(*(part.split(1) for part in call), strict=True)
    with enable(uvit, "3+tome:0.5:F2@0.5,3+tome:0.25:R2@1"):
        close(run(uvit, *call), torch.cat([run(front, *first), run(rear, *last)]))


def test_a_uvits_dropped_blocks_merge_nothing(uvit):
    call = uvit_inputs(MIXED)
    schedule = "3@0.3,1+tome:0.5:R3@0.6,0+tome:0.5@1"
    with enable(uvit, schedule):
        output = run(uvit, *call)
        close(output, alone(uvit, *call))
    twin = merged_uvit(uvit, 0.5, range(7))
    with enable(twin, "uniform:0"):
        close(output[:1], run(twin, *(part[:1] for part in call)))
    close(output[1::2], run(uvit, *(part[1::2] for part in call)))


# --- gradients, copies, compilation --------------------------------------------------------------


def gradients(model, *calls):
    model.zero_grad(set_to_none=True)
    losses = [
        model(x, timestep=t, class_labels=y, return_dict=False)[0].square().sum()
        for x, t, y in calls
    ]
    sum(losses).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b):
    assert a.keys() == b.keys()
    largest = max(g.abs().max() for g in b.values())
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], atol=float(2e-6 * largest), rtol=1e-4)


def test_gradients_flow_through_the_merging(dit):
    call = inputs([500, 500])
    expected = gradients(merged_dit(dit, 0.5, range(6)), call)
    expected = {name.replace("attn1.attention", "attn1"): g for name, g in expected.items()}
    with enable(dit, "tome:0.5"):
        same_gradients(gradients(dit, call), expected)


@pytest.mark.parametrize("schedule", [f"{LITERAL}+tome:0.5:F3", VARYING])
@pytest.mark.parametrize("batches", [[MIXED], [[900, 900], [500, 500], MIXED]])
def test_checkpointing_changes_no_gradient(dit, schedule, batches):
    calls = [inputs(batch, seed=seed) for seed, batch in enumerate(batches)]
    enable(dit, schedule)
    expected = gradients(dit, *calls)
    dit.enable_gradient_checkpointing()
    same_gradients(gradients(dit, *calls), expected)


def test_checkpointing_changes_no_gradient_of_a_uvit(uvit):
    calls = [uvit_inputs(batch, seed) for seed, batch in enumerate([MIXED, [900, 900]])]
    enable(uvit, "3+tome:0.25@0.3,1@0.6,0+tome:0.5:F5@1")
    expected = gradients(uvit, *calls)
    uvit.enable_gradient_checkpointing()
    same_gradients(gradients(uvit, *calls), expected)


def test_a_deep_copy_merges_with_its_own_weights(dit):
    call = inputs(MIXED)
    enable(dit, VARYING)
    output = run(dit, *call)
    twin = copy.deepcopy(dit)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.zero_()
    assert torch.equal(run(twin, *call), output)
    disable(twin)
    assert not any("forward" in vars(module) for module in twin.modules())


def compiled(model):
    """The model compiled, and the graphs that it has become so far."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, backend=backend, fullgraph=True), graphs


def test_one_whole_graph_for_each_merging(make_dit):
    dit = make_dit(1)
    enable(dit, "1+tome:0.25@0.3,1@0.5,1+tome:0.5@1")
    model, graphs = compiled(dit)
    for timestep in (900, 400, 200, 950, 50):
        call = inputs([timestep] * 2)
        assert torch.equal(run(model, *call), run(dit, *call))
    assert len(graphs) == 3
    nodes = [node.meta.get("example_value") for graph in graphs for node in graph.graph.nodes]
    shapes = [value.shape for value in nodes if isinstance(value, torch.Tensor)]
    assert shapes
    assert all(type(size) is int for shape in shapes for size in shape)


def test_a_uvit_compiles_whole():
    uvit = small_uvit(2)
    enable(uvit, "uniform:0+tome:0.5")
    model, graphs = compiled(uvit)
    for timestep in (100, 900):
        call = uvit_inputs([timestep] * 2)
        assert torch.equal(run(model, *call), run(uvit, *call))
    assert len(graphs) == 1


# --- what is refused -------------------------------------------------------------------------


def test_a_family_without_attentions_is_refused(dit, monkeypatch):
    monkeypatch.setattr(DiT, "self_attention", None)
    before = traces(dit)
    with pytest.raises(AccelkitError, match=r"cannot be merged in a dit: .*leave tome:0\.3 out"):
        enable(dit, "D4+tome:0.3")
    assert enabled_on(dit) is None
    assert traces(dit) == before
    with enable(dit, "D4"):
        assert enabled_on(dit) is not None


def test_more_blocks_than_there_are_are_refused(dit, uvit):
    with pytest.raises(AccelkitError, match=r"tome:0\.3:F7 merges tokens in 7 blocks.*has 6"):
        enable(dit, "tome:0.3:F7")
    with enable(uvit, "tome:0.3:F7"):  # the schedule counts three of them
        assert enabled_on(uvit).schedule.layers == 3


def test_a_schedule_knows_how_it_merges():
    schedule = Schedule.parse(VARYING, 6)
    assert [str(m) for m in schedule.merges] == ["tome:0.25:R2", "tome:0.5"]
    assert Schedule.parse("D4").merges == ()
    assert not Schedule.parse("tome:0.3").full
