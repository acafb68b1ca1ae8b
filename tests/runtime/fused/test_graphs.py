"""One graph per depth and batch size: by a stand-in for CUDA graphs, and by torch.compile."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from small_models import DiT, Flux, PixArt, UViT, mixed
from test_fused import relative, run

import accelkit
from accelkit.errors import AccelkitError
from accelkit.runtime.graphs import Graphs
from accelkit.runtime.switch import disable, enable

FAMILIES = pytest.mark.parametrize("family", [DiT, UViT, PixArt])


class Captures(list):
    """Captures as CUDA does: inputs are copied to fixed tensors, and the operations are fixed."""

    def __call__(self, each):
        given = {name: tensor.clone() for name, tensor in each.tensors.items()}
        self.append(each.key)

        def replay(tensors):
            for name, tensor in tensors.items():
                assert given[name].shape == tensor.shape
                given[name].copy_(tensor)
            return each(given)

        return replay


def with_graphs(model, schedule, limit=16):
    state = enable(model, schedule)
    captures = Captures()
    state.fused.graphs = Graphs(state.fused, captures, limit)
    return state, captures


@torch.no_grad()
def check(family, model, calls):
    """Compare with another model of the same weights, since a copy would move them."""
    outputs = [model(**call).sample for call in calls]
    twin = family.make()
    for own, new in zip(twin.parameters(), model.parameters(), strict=True):
        own.copy_(new)
    for call, output in zip(calls, outputs, strict=True):
        assert relative(output, run(twin, call, family.schedule, "off")) < 1e-6


@FAMILIES
def test_one_for_each_depth(family):
    family = family()
    model = family.make()
    _, captures = with_graphs(model, family.schedule)
    check(family, model, [family.call(t) for t in (*family.depths, *family.depths)])
    assert [key[0] for key in captures] == list(family.depths.values())


def test_labels_and_timesteps_change_under_it():
    family = DiT()
    model = family.make()
    _, captures = with_graphs(model, family.schedule)
    labels = ([0, 1, 2, 3], [5, 5, 5, 5], [1000, 1000, 2, 2])
    calls = [
        mixed(family, [t] * 4) | {"class_labels": torch.tensor(y)}
        for t, y in zip((100, 200, 299), labels, strict=True)
    ]
    check(family, model, [*calls, calls[0]])
    assert len(captures) == 1


@FAMILIES
def test_one_for_each_size_of_batch(family):
    family = family()
    model = family.make()
    _, captures = with_graphs(model, family.schedule)
    check(family, model, [mixed(family, [100] * n) for n in (2, 3, 1, 3, 2, 1)])
    assert len(captures) == 3


def test_the_least_recently_used_is_dropped():
    family = DiT()
    model = family.make()
    state, captures = with_graphs(model, family.schedule, limit=2)
    call = {n: mixed(family, [100] * n) for n in (1, 2, 3)}
    check(family, model, [call[1], call[2], call[1], call[3], call[1]])
    assert len(captures) == 3
    assert len(state.fused.graphs) == 2
    check(family, model, [call[2]])
    assert len(captures) == 4


@FAMILIES
def test_weights_written_to_in_place_are_seen(family):
    family = family()
    model = family.make()
    _, captures = with_graphs(model, family.schedule)
    calls = [family.call(t) for t in family.depths]
    check(family, model, calls)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    check(family, model, calls)
    # at a depth of 0 a U-ViT's folded skips are then other tensors
    assert len(captures) == (4 if isinstance(family, UViT) else 3)


@FAMILIES
@pytest.mark.parametrize("how", ["exchanged", "moved"])
def test_weights_moved_or_exchanged_make_new_graphs(family, how):
    family = family()
    model = family.make()
    _, captures = with_graphs(model, family.schedule)
    calls = [family.call(100)]
    check(family, model, calls)
    if how == "moved":
        model.double().float()
    for block in model.modules():
        if how == "exchanged" and isinstance(block, torch.nn.Linear):
            block.weight = torch.nn.Parameter(block.weight * 1.1)
    check(family, model, calls)
    assert len(captures) == 2


def test_another_scheduler_moves_the_depths(make_pipe):
    pipe = make_pipe()
    model = pipe.transformer
    state, captures = with_graphs(pipe, "6@0.5,2@1")
    call = mixed(DiT(), [600, 600])
    with torch.no_grad():
        model(**call)
        pipe.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
        model(**call)
    assert state.axis.level(600.0) < 0.5  # a cosine process adds its noise later
    assert [key[0] for key in captures] == [2, 6]


def test_mixed_depths_and_unusual_blocks_run_without_graphs():
    family = DiT()
    model = family.make()
    _, captures = with_graphs(model, family.schedule)
    check(family, model, [mixed(family, [100, 900])])
    model.transformer_blocks[3].ff.register_forward_hook(lambda *_: None)
    check(family, model, [family.call(100)])
    assert not captures
    check(family, model, [family.call(900)])  # does not run the block with the hook
    assert not captures


def test_a_copy_keeps_the_graphs():
    family = DiT()
    model = family.make()
    state, _ = with_graphs(model, family.schedule)
    graphs = state.fused.graphs
    copy.deepcopy(model)
    assert state.fused.graphs is graphs
    check(family, model, [family.call(100)])
    assert len(graphs) == 1


def test_disabling_ends_the_graphs():
    family = DiT()
    model = family.make()
    _, captures = with_graphs(model, family.schedule)
    disable(model)
    run(model, family.call(100), family.schedule)
    assert not captures


# --- torch.compile -----------------------------------------------------------------------------


@FAMILIES
def test_compiled_as_whole_graphs(family):
    family = family()
    torch._dynamo.reset()
    model = family.make()
    state = enable(model, family.schedule)
    accelkit.compile(model, "aot_eager")
    calls = [family.call(t) for t in (*family.depths, *family.depths)]
    check(family, model, calls)
    assert len(state.fused.graphs) == len(family.depths)
    if family.__class__ is DiT:
        other = calls[0] | {"class_labels": torch.tensor([7, 7])}
        check(family, model, [other])
        assert len(state.fused.graphs) == len(family.depths)


def test_a_pipeline_by_compiled_calls(make_pipe):
    pipe = make_pipe()

    def images():
        draw = torch.Generator().manual_seed(0)
        return pipe([1, 2], num_inference_steps=4, generator=draw, output_type="np").images

    with enable(pipe, "6@0.5,2@1", kernels="off"):
        expected = images()
    with enable(pipe, "6@0.5,2@1"):
        accelkit.compile(pipe, "eager")
        assert abs(images() - expected).max() < 1e-5


def test_what_cannot_be_compiled_says_so(dit):
    with pytest.raises(AccelkitError, match="runs no schedule; call"):
        accelkit.compile(dit)
    with enable(dit, "full"):
        with pytest.raises(AccelkitError, match=r"need a CUDA device, .* on the cpu"):
            accelkit.compile(dit)
        with pytest.raises(AccelkitError, match="mode='fast'; expected 'graphs' or a backend"):
            accelkit.compile(dit, "fast")
        with pytest.raises(AccelkitError, match="how many graphs to keep"):
            accelkit.compile(dit, "eager", limit=0)
    enable(dit, "full", kernels="off")
    with pytest.raises(AccelkitError, match=r"own modules \(kernels are off\); use torch.compile"):
        accelkit.compile(dit, "eager")
    flux = Flux().make()
    enable(flux, Flux.schedule)
    with pytest.raises(AccelkitError, match="a flux has no fused forward"):
        accelkit.compile(flux, "eager")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@FAMILIES
def test_cuda_graphs(family):
    family = family()
    model = family.make().cuda()
    state = enable(model, family.schedule)
    accelkit.compile(model)
    own = family.make().cuda()
    for t in (*family.depths, *family.depths):
        call = {k: v.cuda() if torch.is_tensor(v) else v for k, v in family.call(t).items()}
        with torch.no_grad():
            output = model(**call).sample
        assert relative(output, run(own, call, family.schedule, "off")) < 1e-5
    assert len(state.fused.graphs) == len(family.depths)
