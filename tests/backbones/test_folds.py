"""Folded skips against the chain of projections that they replace."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from plain import enable
from torch.utils.flop_counter import FlopCounterMode

from accelkit.backbones import backbone_of
from accelkit.backbones.folds import LEAST_RUN, FoldedSkips, fold
from accelkit.models import UViTTransformer2DModel
from accelkit.runtime.switch import enabled_on

WIDTH = 64


def linears(count, seed=0, width=WIDTH, dtype=torch.float32):
    """Make projections that keep the scale of their inputs."""
    torch.manual_seed(seed)
    made = [torch.nn.Linear(2 * width, width) for _ in range(count)]
    for linear in made:
        torch.nn.init.normal_(linear.weight, std=(2 * width) ** -0.5)
        torch.nn.init.normal_(linear.bias, std=0.5)
    return [linear.to(dtype) for linear in made]


def tokens(count, seed=1, width=WIDTH, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 9, width, generator=draw).to(dtype) for _ in range(count)]


@torch.no_grad()
def chain(run, x, skips, dtype=torch.float64):
    x = x.to(dtype)
    for linear, skip in zip(run, skips, strict=True):
        both = torch.cat([x, skip.to(dtype)], dim=-1)
        x = both @ linear.weight.to(dtype).T + linear.bias.to(dtype)
    return x


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


# --- the fold itself -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6, 14])
def test_a_fold_is_the_chain(count):
    run = linears(count)
    x, *skips = tokens(count + 1)
    exact = chain(run, x, skips)
    folded = fold(run)
    assert folded.weight.shape == (WIDTH, (count + 1) * WIDTH)
    assert folded.bias.shape == (WIDTH,)
    assert error(folded(x, skips), exact) < 1e-6
    assert (
        error(
            fold([linear.double() for linear in run])(x.double(), [s.double() for s in skips]),
            exact,
        )
        < 1e-14
    )


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_weights_are_folded_in_float32_and_rounded_once(dtype, unit):
    run = linears(6, dtype=dtype)
    folded = fold(run)
    exact = fold([linear.double() for linear in run])
    assert folded.weight.dtype == folded.bias.dtype == dtype
    for found, wanted in ((folded.weight, exact.weight), (folded.bias, exact.bias)):
        distance = (found.double() - wanted).abs()
        assert (distance <= 1.01 * unit * wanted.abs() + 1e-6).all()


def test_autocast_leaves_the_folding_alone():
    run = linears(3)
    plain = fold(run)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fold(run).weight, plain.weight)


# --- how long it holds -----------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.skip_linear = linear


def folded_skips(count=4):
    blocks = torch.nn.ModuleList(map(Block, linears(count)))
    return blocks, FoldedSkips(blocks)


def holds(blocks, folds, depth=1):
    """Whether the current fold is that of the current weights."""
    run = [block.skip_linear for block in blocks[depth:]]
    return torch.equal(folds.at(depth).weight, fold(run).weight)


def test_folds_are_made_when_first_asked_for_and_kept():
    blocks, folds = folded_skips()
    assert folds.made(1) is None
    first = folds.at(1)
    assert folds.at(1) is folds.made(1) is first
    assert folds.at(0) is not first
    assert first.weight.shape == (WIDTH, 4 * WIDTH)
    assert not first.weight.requires_grad
    assert holds(blocks, folds)
    folds.clear()
    assert folds.made(1) is None


def test_a_run_of_one_is_not_folded():
    _, folds = folded_skips(4)
    assert LEAST_RUN == 2
    assert folds.at(2) is not None
    assert folds.at(3) is folds.at(4) is None


def in_place(linear):
    with torch.no_grad():
        linear.weight.add_(1)


def in_inference_mode(linear):
    with torch.inference_mode():
        linear.bias.add_(1)


def optimiser(linear):
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.AdamW([linear.weight], lr=0.1).step()


def replaced_data(linear):
    linear.weight.data = linear.weight.data + 1


def replaced_parameter(linear):
    linear.weight = torch.nn.Parameter(linear.weight.detach() + 1)


def fused_optimiser(linear):
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.AdamW([linear.weight], lr=0.1, fused=True).step()


def average_swapped_in(linear):
    ema = EMAModel(linear.parameters())
    for shadow in ema.shadow_params:
        shadow.mul_(2)
    ema.copy_to(linear.parameters())


def bias_through_data(linear):
    linear.bias.data.mul_(2)


def one_weight_through_data(linear):
    linear.weight.data[5, 3] *= 3


def loaded(linear):
    linear.load_state_dict({k: v + 1 for k, v in linear.state_dict().items()})


def half(linear):
    linear.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_inference_mode,
        optimiser,
        fused_optimiser,
        average_swapped_in,
        bias_through_data,
        one_weight_through_data,
        replaced_data,
        replaced_parameter,
        loaded,
        half,
    ],
)
def test_new_weights_drop_it(change):
    blocks, folds = folded_skips()
    first = folds.at(1)
    change(blocks[2].skip_linear)
    assert folds.at(1) is not first
    assert holds(blocks, folds)


def test_new_weights_at_the_old_address_drop_it():
    blocks, folds = folded_skips()
    weight = blocks[2].skip_linear.weight
    memory = weight.detach().numpy().copy()
    weight.data = torch.from_numpy(memory)
    first, place = folds.at(1), weight.data_ptr()
    memory += 1
    weight.data = torch.from_numpy(memory)
    assert weight.data_ptr() == place
    assert folds.at(1) is not first
    assert holds(blocks, folds)


@pytest.mark.parametrize("device", ["cpu", "other"])
def test_off_the_cpu_weights_are_compared_once_a_run(device, monkeypatch):
    """The host must not wait for a GPU at every step."""
    blocks, folds = folded_skips()
    compared = []
    same = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(1) or same(a, b))
    if device == "other":
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    runs = []
    for _ in range(3):
        for depth in (0, 0, 1, 1, 2, 4):
            folds.at(depth)
        runs.append(len(compared))
    once, twice = 2 * (4 + 3 + 2), 2 * (4 + 3)  # weights and biases behind depths 0, 1, 2 and 0, 1
    if device == "cpu":  # except when they are folded
        assert runs == [twice, 2 * twice + once, 3 * twice + 2 * once]
    else:
        assert runs == [0, once, 2 * once]
    blocks[3].skip_linear.weight.data.mul_(2)
    for depth in (0, 1, 2):
        monkeypatch.setattr(torch, "equal", same)
        assert holds(blocks, folds, depth)


def test_weights_of_other_depths_do_not_drop_it():
    blocks, folds = folded_skips()
    first = folds.at(2)
    in_place(blocks[1].skip_linear)
    assert folds.at(2) is first


@pytest.mark.parametrize(
    "spoil",
    [
        lambda block: setattr(block, "skip_linear", torch.nn.Sequential(block.skip_linear)),
        lambda block: setattr(block.skip_linear, "forward", lambda x: x),
        lambda block: block.skip_linear.register_forward_hook(lambda *_: None),
        lambda block: block.skip_linear.register_forward_pre_hook(lambda *_: None),
        lambda block: torch.nn.utils.parametrizations.weight_norm(block.skip_linear),
    ],
)
def test_only_plain_linear_layers_are_folded(spoil):
    blocks, folds = folded_skips()
    assert folds.at(1) is not None
    spoil(blocks[3])
    assert folds.at(1) is folds.made(1) is None


def test_weights_made_in_inference_mode_cannot_be_watched():
    with torch.inference_mode():
        _, folds = folded_skips()
        assert folds.at(1) is None
    assert folds.at(1) is None


def test_a_fold_made_in_inference_mode_can_be_used_outside():
    blocks, folds = folded_skips()
    with torch.inference_mode():
        made = folds.at(1)
    assert folds.at(1) is made
    assert not made.weight.is_inference()
    assert holds(blocks, folds)


# --- in a model ------------------------------------------------------------------------------


@pytest.fixture
def uvit():
    """Six decoder blocks."""
    torch.manual_seed(0)
    model = UViTTransformer2DModel(8, 2, 4, 12, 2, 16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def call(seed=1):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)), 500


def chained(model, *args):
    """Run the chain, as every call does that records gradients."""
    return model(*args).sample.detach()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("depth", range(7))
def test_a_model_agrees_with_its_chain(uvit, depth, mode):
    enable(uvit, f"uniform:{depth}")
    expected = chained(uvit, *call())
    with mode():
        output = uvit(*call()).sample
    assert error(output, expected.double()) < 1e-5
    if depth >= 5:
        assert torch.equal(output, expected)


def macs(model):
    counter = FlopCounterMode(display=False)
    with counter:
        model(*call())
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("depth", range(7))
def test_it_saves_about_half_the_multiplications(uvit, depth):
    enable(uvit, f"uniform:{depth}")
    chain_of = macs(uvit)
    with torch.no_grad():
        uvit(*call())  # folding costs something once
        saved = chain_of - macs(uvit)
    run, unit = 6 - depth, 2 * 17 * 32**2  # samples, tokens, width squared
    assert saved == max(0, run - 1) * unit  # 2 run products of D x D become run + 1


def test_training_drops_folds_even_if_weights_are_written_through_data(uvit):
    enable(uvit, "uniform:2")
    with torch.no_grad():
        uvit(*call())
    folds = enabled_on(uvit).backbone.folded
    assert folds.made(2) is not None
    uvit(*call()).sample.sum().backward()
    assert folds.made(2) is None
    uvit.out_blocks[3].skip_linear.weight.data.mul_(2)  # as averages of weights are swapped in
    expected = chained(uvit, *call())
    with torch.no_grad():
        assert error(uvit(*call()).sample, expected.double()) < 1e-5


def test_offloaded_weights_are_not_folded(uvit):
    enable(uvit, "uniform:2")
    expected = chained(uvit, *call())
    away = {block: block.skip_linear.weight for block in uvit.out_blocks}

    def bring(block, args):
        block.skip_linear.weight = away[block]

    for block in uvit.out_blocks:  # as offloading leaves them
        block.skip_linear.weight = torch.nn.Parameter(away[block].to("meta"))
        block.skip_linear.register_forward_pre_hook(
            lambda linear, args, block=block: bring(block, args)
        )
        block.register_forward_pre_hook(bring)
    with torch.no_grad():
        assert torch.equal(uvit(*call()).sample, expected)


def test_a_call_that_fails_has_no_effect_on_the_next(uvit):
    enable(uvit, "uniform:2")
    expected = chained(uvit, *call())
    handle = uvit.out_blocks[4].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            uvit(*call())
        handle.remove()
        assert error(uvit(*call()).sample, expected.double()) < 1e-5


def test_hooks_between_the_blocks_still_change_the_tokens(uvit):
    enable(uvit, "uniform:2")
    with torch.no_grad():
        plain = uvit(*call()).sample
        uvit.out_blocks[4].register_forward_hook(lambda module, args, output: output + 1)
        found = uvit(*call()).sample
    assert not torch.equal(found, plain)
    assert (
        error(found, uvit(*call()).sample.detach().double()) < 1e-5
    )  # with gradients nothing is folded


def test_no_tensor_of_a_call_is_kept(uvit):
    state = enable(uvit, "uniform:2")
    with torch.no_grad():
        uvit(*call())
    kept = [v for v in vars(state.backbone).values() if isinstance(v, (torch.Tensor, list))]
    assert not kept
    assert state._router.running is None


def test_a_bare_view_of_the_model_folds_nothing(uvit):
    assert backbone_of(uvit).folded.made(0) is None
