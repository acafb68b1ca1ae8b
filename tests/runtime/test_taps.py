"""Taps against networks cut by hand: predictions, their gradients, and which blocks run."""

import copy

import pytest
import torch

from accelkit.backbones import backbone_of
from accelkit.errors import AccelkitError
from accelkit.runtime.switch import disable, enable
from accelkit.runtime.taps import Taps
from accelkit.schedule import Schedule
from accelkit.train.dvd import OwnHeads

# Levels of the timesteps below: 0.1, 0.5, 0.7 and 0.95 run 4, 3, 2 and 1 blocks, of U-ViT's
# decoder 4, 3, 1 and 0.
SCHEDULE = "4@0.3,3@0.6,2@0.8,1@1"
DECODER = "4@0.3,3@0.6,1@0.8,0@1"
LEVELS = (0.1, 0.5, 0.7, 0.95)
MIXED = [3, 0, 1, 2, 0]
ALIKE = [0, 0, 0]


def dit(draw, batch):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return model, {
        "hidden_states": draw(batch, 4, 8, 8),
        "class_labels": torch.arange(batch) * 3 % 10,
    }


def pixart(draw, batch):
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=24,
        caption_channels=12,
        sample_size=8,
        use_additional_conditions=True,
    )
    return model, {
        "hidden_states": draw(batch, 4, 8, 8),
        "encoder_hidden_states": draw(batch, 5, 12),
        "added_cond_kwargs": {
            "resolution": draw(batch, 2).abs() * 100,
            "aspect_ratio": draw(batch, 1).abs(),
        },
    }


def sd3(draw, batch):
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    return model, {
        "hidden_states": draw(batch, 4, 8, 8),
        "encoder_hidden_states": draw(batch, 5, 12),
        "pooled_projections": draw(batch, 10),
    }


def flux(draw, batch):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=False,
        axes_dims_rope=(4, 2, 2),
    )
    return model, {
        "hidden_states": draw(batch, 6, 4),
        "encoder_hidden_states": draw(batch, 5, 12),
        "pooled_projections": draw(batch, 10),
        "img_ids": torch.arange(18.0).view(6, 3) % 4,
        "txt_ids": torch.zeros(5, 3),
    }


def sana(draw, batch):
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=6,
    )
    return model, {
        "hidden_states": draw(batch, 4, 6, 6),
        "encoder_hidden_states": draw(batch, 5, 12),
    }


def uvit(draw, batch):
    from accelkit.models import UViTTransformer2DModel

    model = UViTTransformer2DModel(
        sample_size=8, num_layers=8, num_attention_heads=2, attention_head_dim=8, num_classes=10
    )
    return model, {"sample": draw(batch, 3, 8, 8), "class_labels": torch.arange(batch) % 10}


FAMILIES = [dit, pixart, sd3, flux, sana, uvit]
KINDS = [dit, flux, uvit]  # one state, two lists of blocks, skipped blocks that have an effect


class Case:
    """A family's tiny network, a batch for it, and the network cut by hand."""

    def __init__(self, family, which=MIXED):
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model, self.call = family(
                lambda *shape: torch.randn(*shape, generator=generator), len(which)
            )
            for parameter in self.model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        self.model.train()
        self.decoder = family is uvit
        self.schedule = Schedule.parse(
            DECODER if self.decoder else SCHEDULE, 4, "uvit" if self.decoder else "dit"
        )
        self.own = [self.schedule.depth_at(LEVELS[i]) for i in which]
        scale = backbone_of(self.model).timestep_scale
        self.call["timestep"] = torch.tensor([1000 * LEVELS[i] * scale for i in which])

    @property
    def blocks(self):
        return list(backbone_of(self.model).blocks)

    def on(self):
        # the reference process: level = timestep / 1000 in every family
        return enable(self.model, self.schedule)

    def cut(self, depth):
        """A copy with ``depth`` blocks, U-ViT's dropped ones reduced to their skip projection."""
        short = copy.deepcopy(self.model)
        if self.decoder:
            for block in short.out_blocks[depth:]:
                block.forward = block.join
            return short
        lists = [
            n for n in ("transformer_blocks", "single_transformer_blocks") if hasattr(short, n)
        ]
        for name in lists:
            whole = getattr(short, name)
            setattr(short, name, whole[:depth])
            depth -= len(getattr(short, name))
        return short

    def rows(self, index):
        def pick(value):
            if isinstance(value, dict):
                return {k: pick(v) for k, v in value.items()}
            return value[index]

        shared = ("img_ids", "txt_ids")
        return {k: v if k in shared else pick(v) for k, v in self.call.items()}


def weighted(output, rows, depth):
    """A loss with gradients that differ between samples, places and exits."""
    places = torch.linspace(-1, 1, output[0].numel()).view(output[0].shape)
    return ((rows.view(-1, *[1] * places.ndim) + depth + 1) * places * output).sum()


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5 * float(other.detach().abs().max()), rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "which"),
    [*((family, MIXED) for family in FAMILIES), *((family, ALIKE) for family in KINDS), (dit, [0])],
)
def test_taps_equal_separate_truncated_passes(family, which):
    """Outputs and, all exits' losses together, gradients."""
    case = Case(family, which)
    with case.on() as enabled, Taps(enabled) as taps:
        output = case.model(**case.call).sample
        taken = taps.pop()
        loss = weighted(output, torch.arange(len(which)), 0)
        loss = loss + sum(weighted(tap.output, tap.rows, tap.depth) for tap in taken)
        loss.backward()
    assert [tap.depth for tap in taken] == list(case.schedule.depths[:-1])
    expected = {}

    def separately(depth, rows, own):
        short = case.cut(depth)
        short.zero_grad()
        single = short(**case.rows(rows)).sample
        weighted(single, rows, 0 if own else depth).backward()
        for name, gradient in gradients(short).items():
            expected[name] = expected.get(name, 0) + gradient
        return single

    for tap in taken:
        deeper = [row for row, depth in enumerate(case.own) if depth > tap.depth]
        assert sorted(tap.rows.tolist()) == deeper
        close(tap.output, separately(tap.depth, tap.rows, own=False))
    for row, depth in enumerate(case.own):
        close(output[row : row + 1], separately(depth, torch.tensor([row]), own=True))
    found = gradients(case.model)
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-5 * largest, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", KINDS)
def test_no_block_runs_twice(family):
    case, ran = Case(family), []
    for index, block in enumerate(backbone_of(case.model).all_blocks):
        attention = next(m for n, m in block.named_modules() if n in ("attn", "attn1"))
        attention.register_forward_hook(lambda *_, index=index: ran.append(index))
    with case.on() as enabled, Taps(enabled):
        case.model(**case.call)
    assert ran == sorted(set(ran))
    assert len(ran) == len(backbone_of(case.model).all_blocks)


@pytest.mark.parametrize("family", KINDS)
def test_an_exits_loss_reaches_only_the_blocks_before_it(family):
    case = Case(family)
    for depth in case.schedule.depths[:-1]:
        case.model.zero_grad()
        with case.on() as enabled, Taps(enabled) as taps:
            case.model(**case.call)
            (tap,) = [tap for tap in taps.pop() if tap.depth == depth]
            weighted(tap.output, tap.rows, depth).backward()
        for index, block in enumerate(case.blocks):
            moved = {n for n, p in block.named_parameters() if p.grad is not None and p.grad.any()}
            if index < depth:
                assert moved
            else:  # a dropped block of a U-ViT keeps its skip projection
                assert {n.split(".")[0] for n in moved} <= {"skip_linear"}
                assert bool(moved) == case.decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_exits_with_their_own_heads(family):
    """They start as copies; an exit's loss trains its own head and not the network's."""
    case = Case(family)
    keys = case.model.state_dict().keys()
    with case.on() as enabled:
        with Taps(enabled) as taps:
            case.model(**case.call)
            expected = taps.pop()
        heads = OwnHeads(enabled.backbone, case.schedule.depths[:-1])
        with Taps(enabled, heads.used) as taps:
            output = case.model(**case.call).sample
            taken = taps.pop()
    assert case.model.state_dict().keys() == keys
    assert len(taken) == len(expected) > 1
    for one, other in zip(taken, expected, strict=True):
        assert torch.equal(one.output, other.output)
    weighted(taken[0].output, taken[0].rows, 1).backward(retain_graph=True)
    own = gradients(heads)
    assert {n.split(".")[1] for n in own} == {str(taken[0].depth)}
    assert any(gradient.any() for gradient in own.values())
    head = enabled.backbone.head
    assert not any(n.startswith(head) for n in gradients(case.model))
    weighted(output, torch.arange(len(output)), 0).backward()
    assert any(n.startswith(head) for n in gradients(case.model))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("which", [MIXED, ALIKE])
def test_own_outputs_stay_as_they_are(family, which):
    case = Case(family, which)
    with case.on() as enabled:
        expected = case.model(**case.call).sample
        with Taps(enabled):
            assert torch.equal(case.model(**case.call).sample, expected)
        assert torch.equal(case.model(**case.call, return_dict=False)[0], expected)


@pytest.mark.parametrize("family", KINDS)
def test_gradient_checkpointing_changes_nothing(family):
    case, found = Case(family), []
    for checkpointing in (False, True):
        case.model.zero_grad()
        if checkpointing:
            case.model.enable_gradient_checkpointing()
        with case.on() as enabled, Taps(enabled) as taps:
            output = case.model(**case.call).sample
            taken = taps.pop()
            exits = [weighted(tap.output, tap.rows, tap.depth) for tap in taken]
            (weighted(output, torch.arange(len(output)), 0) + sum(exits)).backward()
        found.append(({n: g.clone() for n, g in gradients(case.model).items()}, taken))
    (plain, plainly), (recomputed, again) = found
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
    for one, other in zip(plainly, again, strict=True):
        assert torch.equal(one.output, other.output)


def test_both_call_styles():
    case = Case(dit)
    call = case.call
    args = (call["hidden_states"], call["timestep"], call["class_labels"])
    with case.on() as enabled, Taps(enabled) as taps:
        case.model(**call)
        expected = taps.pop()
        case.model(*args, return_dict=False)
        for one, other in zip(taps.pop(), expected, strict=True):
            assert torch.equal(one.output, other.output)
            assert torch.equal(one.rows, other.rows)


def test_one_timestep_for_all_samples():
    case = Case(dit, ALIKE)
    with case.on() as enabled, Taps(enabled) as taps:
        case.model(**case.call)
        expected = taps.pop()
        case.model(**{**case.call, "timestep": case.call["timestep"][:1]})
        for one, other in zip(taps.pop(), expected, strict=True):
            close(one.output, other.output)


def test_a_batch_that_cannot_narrow_is_tapped_in_several_passes(monkeypatch):
    case = Case(pixart)
    with case.on() as enabled, Taps(enabled) as taps:
        case.model(**case.call)
        expected = {
            tap.depth: dict(zip(tap.rows.tolist(), tap.output, strict=True)) for tap in taps.pop()
        }
        monkeypatch.setattr(type(enabled.backbone), "narrows", lambda self, call: False)
        case.model(**case.call)
        taken = taps.pop()
    assert {tap.depth for tap in taken} == set(expected)
    for tap in taken:
        assert set(tap.rows.tolist()) == set(expected[tap.depth])
        for row, output in zip(tap.rows.tolist(), tap.output, strict=True):
            close(output, expected[tap.depth][row])


def test_the_shallowest_samples_have_no_earlier_exit():
    case = Case(dit, [3, 3])
    with case.on() as enabled, Taps(enabled) as taps:
        case.model(**case.call)
        assert taps.pop() == []


def test_calls_without_gradients_are_not_tapped():
    case = Case(dit)
    with case.on() as enabled, Taps(enabled) as taps:
        with torch.no_grad():
            case.model(**case.call)
        assert taps.pop() == []


def test_a_prediction_is_popped_once():
    case = Case(dit)
    with case.on() as enabled, Taps(enabled) as taps:
        case.model(**case.call)
        assert taps.pop()
        assert taps.pop() == []
        with torch.no_grad():
            case.model(**case.call)
        assert enabled._router.running is None  # nothing is kept alive


def test_a_call_that_fails_leaves_nothing_behind():
    case = Case(dit)
    with case.on() as enabled, Taps(enabled) as taps:
        case.model(**case.call)
        expected = taps.pop()
        handle = case.blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.model(**case.call)
        handle.remove()
        case.model(**case.call)
        for one, other in zip(taps.pop(), expected, strict=True):
            assert torch.equal(one.output, other.output)


def traces(model):
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", KINDS)
def test_nothing_remains_after_the_taps(family):
    case = Case(family)
    bare = traces(case.model)
    with case.on() as enabled:
        with torch.no_grad():
            expected = case.model(**case.call).sample
        hooked = {n for n, m in case.model.named_modules() if "_diffusers_hook" in vars(m)}
        with Taps(enabled):
            case.model(**case.call)
        assert {n for n, m in case.model.named_modules() if "_diffusers_hook" in vars(m)} == hooked
        with torch.no_grad():
            assert torch.equal(case.model(**case.call).sample, expected)
    assert traces(case.model) == bare


def test_disabling_removes_the_taps_too():
    case = Case(dit)
    bare = traces(case.model)
    with case.on() as enabled:
        Taps(enabled).__enter__()
        disable(case.model)
    assert traces(case.model) == bare


def test_a_copy_runs_its_own_weights_untapped():
    case = Case(dit)
    with case.on() as enabled, Taps(enabled) as taps:
        twin = copy.deepcopy(case.model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        output = twin(**case.call).sample
        assert taps.pop() == []
        case.model(**case.call)
        assert [tap.depth for tap in taps.pop()] == [1, 2, 3]
        assert not torch.equal(output, case.model(**case.call).sample)


def test_one_depth_has_no_earlier_exit():
    case = Case(dit)
    for schedule in ("full", "uniform:2"):
        with enable(case.model, schedule) as enabled:
            with pytest.raises(AccelkitError, match="no earlier exit") as caught:
                Taps(enabled)
            assert "\n" not in str(caught.value)


def test_a_family_without_an_exit_is_refused(monkeypatch):
    case = Case(dit)
    with case.on() as enabled:
        monkeypatch.setattr(type(enabled.backbone), "exit", None)
        with pytest.raises(AccelkitError, match="accelkit knows no module"):
            Taps(enabled)
