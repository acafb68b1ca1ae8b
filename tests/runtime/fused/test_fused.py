"""Fused forwards against the model's own modules."""

import copy

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from small_models import DiT, Flux, PixArt, UViT, mixed

import accelkit
from accelkit.backbones import dit
from accelkit.errors import AccelkitError
from accelkit.runtime.fused import base, ops, threads
from accelkit.runtime.switch import disable, enable, enabled_on

FAMILIES = pytest.mark.parametrize(
    "family", [DiT(), UViT(), PixArt()], ids=["DiT", "UViT", "PixArt"]
)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture
def passes(monkeypatch):
    """Record the plans of fused passes."""
    seen = []
    real = base.FusedForward.pass_of

    def spied(self, plan, *rest):
        found = real(self, plan, *rest)
        if found is not None:
            seen.append(plan)
        return found

    monkeypatch.setattr(base.FusedForward, "pass_of", spied)
    return seen


@torch.no_grad()
def run(model, call, schedule="full", kernels="auto"):
    with enable(model, schedule, kernels=kernels):
        return model(**call).sample


@FAMILIES
@pytest.mark.parametrize("timestep", [100, 500, 900])
def test_agrees_with_the_own_modules_at_every_depth(family, passes, timestep):
    model, call = family.make(), family.call(timestep)
    expected = run(model, call, family.schedule, "off")
    assert not passes
    output = run(model, call, family.schedule)
    assert [p.depth for p in passes] == [family.depths[timestep]]
    assert relative(output, expected) < 1e-6


@FAMILIES
@pytest.mark.parametrize(
    "timesteps", [[900, 100, 500, 100], [500, 900], [100, 100, 900], [900] * 3]
)
def test_a_batch_of_mixed_noise_levels(family, passes, timesteps):
    model, call = family.make(), mixed(family, timesteps)
    expected = run(model, call, family.schedule, "off")
    assert relative(run(model, call, family.schedule), expected) < 1e-6
    assert len(passes) == 1


@FAMILIES
def test_a_sample_does_not_depend_on_its_batch(family):
    model, call = family.make(), mixed(family, [900, 100, 500, 100])
    output = run(model, call, family.schedule)
    for row in range(4):
        alone = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        torch.testing.assert_close(
            run(model, alone, family.schedule), output[row : row + 1], atol=2e-6, rtol=1e-5
        )


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(family, passes, dtype):
    # Compare with float64, since bfloat16 is rounded in other places than by the own modules.
    call = mixed(family, [100, 900, 500])
    wide = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }
    exact = run(family.make().double(), wide, family.schedule, "off")
    passes.clear()
    narrow = {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }
    model = family.make().to(dtype)
    output = run(model, narrow, family.schedule)
    assert len(passes) == 1
    assert output.dtype == dtype
    own = relative(run(model, narrow, family.schedule, "off"), exact)
    assert relative(output, exact) < (max(2e-2, 1.5 * own) if dtype == torch.bfloat16 else 1e-12)


@FAMILIES
def test_both_call_styles(family):
    model, call = family.make(), family.call(500)
    with enable(model, family.schedule), torch.no_grad():
        output = model(**call)
        assert type(output).__name__ == "Transformer2DModelOutput"
        assert torch.equal(model(**call, return_dict=False)[0], output.sample)


@FAMILIES
def test_gradients_use_the_own_modules(family, passes):
    model, call = family.make(), family.call(500)

    def gradients(kernels):
        model.zero_grad(set_to_none=True)
        with enable(model, family.schedule, kernels=kernels):
            model(**call).sample.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients("off"), gradients("auto")
    assert not passes
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


# --- weights ---------------------------------------------------------------------------------


@FAMILIES
def test_disabled_again_everything_is_as_it_was(family):
    model, call = family.make(), family.call(100)
    keys = [(n, p.shape, p.stride()) for n, p in model.named_parameters()]
    identities = [id(p) for p in model.parameters()]
    hooks = dict(model._state_dict_pre_hooks)
    with torch.no_grad():
        before = model(**call).sample
        run(model, call)
        assert torch.equal(model(**call).sample, before)
    assert [(n, p.shape, p.stride()) for n, p in model.named_parameters()] == keys
    assert [id(p) for p in model.parameters()] == identities
    assert dict(model._state_dict_pre_hooks) == hooks
    owners = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(owners)) == len(owners)


@FAMILIES
def test_saving_while_enabled_sees_no_shared_storage(family, tmp_path):
    model, call = family.make(), family.call(100)
    expected = {n: p.clone() for n, p in model.state_dict().items()}
    with enable(model, "full"), torch.no_grad():
        output = model(**call).sample
        state = model.state_dict()
        storages = [t.untyped_storage().data_ptr() for t in state.values()]
        assert len(set(storages)) == len(storages)
        model.save_pretrained(tmp_path)
        assert torch.equal(model(**call).sample, output)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[n], expected[n]) for n in saved)


@FAMILIES
@pytest.mark.parametrize("how", ["in place", "data", "exchanged", "cast and back", "optimiser"])
def test_new_weights_are_seen(family, how):
    model, call = family.make(), family.call(500)
    generator = torch.Generator().manual_seed(7)
    with enable(model, family.schedule):
        with torch.no_grad():
            before = model(**call).sample
        for module in list(model.modules()):
            for name, parameter in list(module.named_parameters(recurse=False)):
                new = parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
                if how == "in place":
                    with torch.no_grad():
                        parameter.copy_(new)
                elif how == "data":
                    parameter.data = new
                elif how == "exchanged":
                    setattr(module, name, torch.nn.Parameter(new))
                elif how == "optimiser":
                    parameter.grad = parameter.detach() - new
        if how == "optimiser":
            torch.optim.SGD(model.parameters(), lr=1).step()
        if how == "cast and back":
            model.double().float()
        with torch.no_grad():
            after = model(**call).sample
    expected = run(model, call, family.schedule, "off")
    assert relative(after, expected) < 1e-6
    assert (relative(after, before) > 1e-2) == (how != "cast and back")


def test_joined_in_inference_mode_the_model_can_still_be_trained():
    family = DiT()
    model, call = family.make(), family.call(500)
    with enable(model, family.schedule):
        with torch.inference_mode():
            model(**call)
        model(**call).sample.sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(not p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_copies_run_their_own_weights(way, tmp_path):
    family = DiT()
    model, call = family.make(), family.call(500)
    with enable(model, family.schedule), torch.no_grad():
        expected = model(**call).sample
        if way == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            torch.save(model, tmp_path / "model.pt")
            twin = torch.load(tmp_path / "model.pt", weights_only=False)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(**call).sample, expected)
        assert enabled_on(twin).kernels == "auto"
        assert not twin(**call).sample.any()


def test_embedders_that_differ_all_run():
    family = DiT()
    model, call = family.make(), mixed(family, [100, 900, 100, 500])
    assert enable(model, "full").backbone.embedders_equal is False  # `filled` draws them so
    disable(model)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    with enable(model, family.schedule), torch.no_grad():
        shared = model(**call).sample
        assert relative(shared, run_own(model, call, family.schedule)) < 1e-6
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight[3] += 1
        apart = model(**call).sample
        assert relative(apart, shared) > 1e-4
        assert relative(apart, run_own(model, call, family.schedule)) < 1e-6


@pytest.mark.parametrize("times", [[500] * 4, [500, 500, 500, 400]])
def test_embedders_are_compared_once_for_the_same_labels_and_one_timestep(monkeypatch, times):
    compared = []
    real = dit.DiT.embedders_equal
    spied = property(lambda self: compared.append(self) or real.fget(self))
    monkeypatch.setattr(dit.DiT, "embedders_equal", spied)
    model = DiT().make()
    with enable(model, "full"), torch.no_grad():
        for _ in range(3):
            model(**mixed(DiT(), times))
    assert len(compared) == (1 if len(set(times)) == 1 else 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_labels_of_a_refused_type_have_no_effect_on_the_next_call(dtype):
    model, call = DiT().make(), mixed(DiT(), [500, 500])
    with enable(model, "full"), torch.no_grad():
        expected = model(**call).sample
        for _ in range(2):
            with pytest.raises((RuntimeError, IndexError), match="Expected tensor for argument"):
                model(**call | {"class_labels": call["class_labels"].to(dtype)})
            assert torch.equal(model(**call).sample, expected)


@pytest.mark.parametrize(
    "odd", [{"hidden_states": torch.zeros(2, 3, 8, 8)}, {"hidden_states": torch.zeros(0, 4, 8, 8)},
            {"hidden_states": torch.zeros(2, 4, 8, 8, dtype=torch.float64)},
            {"hidden_states": torch.zeros(2, 4, 1, 1)}],
    ids=["channels", "none", "dtype", "size"],
)  # fmt: skip
def test_an_input_that_does_not_fit_is_refused_as_by_the_own_modules(odd):
    model, call = DiT().make(), mixed(DiT(), [500, 500]) | odd
    said = []
    for kernels in ("off", "auto"):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - any error of the model
            run(model, call, "full", kernels)
        said.append(str(caught.value))
    assert said[0] == said[1]


def run_own(model, call, schedule):
    """Return the output of a copy of an enabled model by its own modules."""
    twin = copy.deepcopy(model)
    disable(twin)
    return run(twin, call, schedule, "off")


# --- what is not fused -------------------------------------------------------------------------


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 2


def hooked(model, block):
    HookRegistry.check_if_exists_or_initialize(block.attn1).register_hook(Doubling(), "doubling")


def watched(model, block):
    block.ff.register_forward_hook(lambda module, args, output: output * 2)


def replaced(model, block):
    linear = block.attn1.to_q
    block.attn1.to_q = torch.nn.Sequential(linear, torch.nn.ReLU())


def processed(model, block):
    from diffusers.models.attention_processor import AttnProcessor

    block.attn1.set_processor(AttnProcessor())


def adapted(model, block):
    place = list(model.transformer_blocks).index(block)
    target = f"transformer_blocks.{place}.attn1.to_v"
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=[target], init_lora_weights=False), model
    )


def chunked(model, block):
    block.set_chunk_feed_forward(4, 1)


UNUSUAL = {
    hooked: "a hook of diffusers (doubling) on its Attention",
    watched: "a hook on its FeedForward",
    replaced: "its attention's to_q is Sequential, not Linear",
    processed: "its attention processor is AttnProcessor, not AttnProcessor2_0",
    adapted: "its attention's to_v is peft.tuners.lora.layer.Linear, not Linear",
    chunked: "its chunk size is int, not none",
}


@pytest.mark.parametrize(
    ("place", "before"), [(0, False), (1, True), (5, False)], ids=["0-after", "1-before", "5-after"]
)
@pytest.mark.parametrize("change", UNUSUAL, ids=lambda c: c.__name__)
@pytest.mark.parametrize("family", [DiT(), PixArt()], ids=["DiT", "PixArt"])
def test_an_unusual_block_runs_as_its_own_module(family, passes, change, place, before):
    model, call = family.make(), mixed(family, [100, 900, 100])
    block = model.transformer_blocks[place]
    if before:
        change(model, block)
        state = enable(model, family.schedule)
    else:
        state = enable(model, family.schedule)
        with torch.no_grad():
            usual = model(**call).sample
        change(model, block)
    with torch.no_grad():
        output = model(**call).sample
    if not before and change is not chunked:
        assert relative(output, usual) > 1e-6 or change is processed
    paths = state.paths()
    assert [p.startswith("own modules: ") for p in paths] == [i == place for i in range(6)]
    assert paths[place] == "own modules: " + UNUSUAL[change]
    disable(model)
    assert relative(output, run(model, call, family.schedule, "off")) < 1e-6


def test_something_on_a_skipped_block_is_run():
    family = UViT()
    model, call = family.make(), family.call(900)
    calls = []
    model.out_blocks[1].register_forward_hook(lambda module, args, output: calls.append(1))
    run(model, call, family.schedule)
    assert calls == [1]


@pytest.mark.parametrize("part", ["norm_out", "proj_out_1", "proj_out_2"])
def test_something_on_the_exit_keeps_the_whole_model_unfused(passes, part):
    family = DiT()
    model, call = family.make(), family.call(500)
    getattr(model, part).register_forward_hook(lambda module, args, output: output * 2)
    output = run(model, call, family.schedule)
    assert not passes
    assert torch.equal(output, run(model, call, family.schedule, "off"))
    with enable(model, family.schedule) as state:
        assert {p.split(": ")[0] for p in state.paths()} == {"own modules"}


def test_dropout_and_label_dropout_use_the_own_modules(passes):
    family = DiT()
    model, call = family.make(), family.call(500)
    model.train()
    run(model, call, family.schedule)
    assert not passes
    model.eval()
    run(model, call, family.schedule)
    assert passes


def test_autocast_and_merged_tokens_use_the_own_modules(passes):
    family = DiT()
    model, call = family.make(), family.call(500)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, call, family.schedule)
        assert torch.equal(output, run(model, call, family.schedule, "off"))
    run(model, call, "6+tome:0.5@1")
    assert not passes


@pytest.mark.parametrize("timestep", [100, torch.tensor(100)])
def test_a_call_that_the_model_refuses_raises_its_error(timestep):
    family = DiT()
    model = family.make()
    call = family.call(100) | {"timestep": timestep}
    with pytest.raises((AttributeError, AssertionError)) as own:
        run(model, call, "full", "off")
    with pytest.raises(own.type, match=str(own.value)[:20]):
        run(model, call, "full")


def test_one_timestep_and_one_label_for_all():
    family = DiT()
    model, call = family.make(), family.call(500)
    several = run(model, call | {"class_labels": torch.tensor([3, 3])}, family.schedule)
    one = call | {"class_labels": torch.tensor([3]), "timestep": torch.tensor([500])}
    assert relative(run(model, one, family.schedule), several) < 1e-6


def test_kernels_is_auto_or_off(dit):
    with pytest.raises(AccelkitError, match="kernels='on'; expected one of auto, off"):
        accelkit.enable(dit, "full", kernels="on")


def test_families_without_a_fused_forward_say_so():
    family = Flux()
    model = family.make()
    with enable(model, family.schedule) as state:
        assert set(state.paths()) == {"own modules: a flux has no fused forward"}
    with enable(model, family.schedule, kernels="off") as state:
        assert set(state.paths()) == {"own modules: kernels are off"}


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 0], [4] * 5, [4]])
@pytest.mark.parametrize("whole", [False, True])
def test_a_large_batch_is_run_in_parts(monkeypatch, labels, whole):
    family = DiT()
    model = family.make()
    call = mixed(family, [500] * 5) | {"class_labels": torch.tensor(labels)}
    if whole:  # a hook on a block may depend on the whole batch
        block = model.transformer_blocks[1]
        block.register_forward_hook(lambda module, args, output: output - output.mean(0))
    expected = run(model, call, family.schedule, "off")
    monkeypatch.setattr(threads, "_MOST", 2 * 16 * 64)  # two samples at a time
    monkeypatch.setattr(threads, "_FEW", 1)
    sizes, last = [], ops.exit_head
    monkeypatch.setattr(
        ops, "exit_head", lambda x, *rest: (sizes.append(len(x)), last(x, *rest))[1]
    )
    assert relative(run(model, call, family.schedule), expected) < 1e-6
    assert sizes == ([5] if whole else [2, 2, 1])
