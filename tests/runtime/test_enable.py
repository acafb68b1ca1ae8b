"""Schedules on real diffusers models: put on, taken off without a trace, refused, copied."""

import copy
import gc
import inspect
import json
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.hooks import HookRegistry, ModelHook
from plain import enable
from small_dit import MIXED, SCHEDULE, by_hand, close, inputs, run, truncated

from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.runtime import hooks
from accelkit.runtime.switch import disable, enabled_on
from accelkit.schedule import Schedule


def traces(model):
    """The contents of every submodule's ``__dict__``, one level deep."""
    return {
        name: {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def hooked(model):
    return [n for n, m in model.named_modules() if "_diffusers_hook" in vars(m)]


# --- on and off ------------------------------------------------------------------------------


def test_disabled_again_nothing_is_left(dit):
    call = inputs(MIXED)
    before, keys, output = traces(dit), list(dit.state_dict()), run(dit, *call)
    enable(dit, SCHEDULE)
    assert list(dit.state_dict()) == keys
    assert not torch.equal(run(dit, *call), output)
    disable(dit)
    assert traces(dit) == before
    assert list(dit.state_dict()) == keys
    assert torch.equal(run(dit, *call), output)
    assert torch.equal(run(copy.deepcopy(dit), *call), output)


def test_disabled_again_a_registry_that_was_there_stays(dit):
    HookRegistry.check_if_exists_or_initialize(dit)  # as diffusers' cache contexts leave it
    HookRegistry.check_if_exists_or_initialize(dit.transformer_blocks[5])
    before = traces(dit)
    enable(dit, SCHEDULE)
    disable(dit)
    assert traces(dit) == before


def test_full_hooks_nothing_and_changes_no_bit(dit):
    call = inputs(MIXED)
    output = run(dit, *call)
    with enable(dit, "full"):
        assert not hooked(dit)
        assert not any("forward" in vars(module) for module in dit.modules())
        assert torch.equal(run(dit, *call), output)
    assert enabled_on(dit) is None


def test_blocks_that_always_run_carry_no_hook(dit):
    with enable(dit, SCHEDULE):
        blocks = [f"transformer_blocks.{i}" for i in (2, 3, 4, 5)]
        assert sorted(hooked(dit)) == sorted(["", "norm_out", *blocks])


def test_leaving_the_with_block_disables_whatever_happens(dit):
    state = enable(dit, SCHEDULE)
    with pytest.raises(KeyError), state as entered:
        _ = {}[entered is enabled_on(dit) is state]
    assert enabled_on(dit) is None
    with enable(dit, SCHEDULE):
        disable(dit)  # early: the end of the block is then silent
    with enable(dit, SCHEDULE):
        disable(dit)
        later = enable(dit, "uniform:3")
    assert enabled_on(dit) is later  # the block ends its own schedule only


def test_a_failed_call_leaves_nothing_for_the_next_one(dit):
    call = inputs(MIXED)
    expected = by_hand(dit, *call)

    def fail(*_):
        raise RuntimeError("mine")

    with enable(dit, SCHEDULE):
        handle = dit.transformer_blocks[5].attn1.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="mine"):
            run(dit, *call)
        handle.remove()
        close(run(dit, *call), expected)


def test_enabling_twice_raises_and_changes_nothing(dit):
    call = inputs(MIXED)
    state = enable(dit, SCHEDULE)
    output = run(dit, *call)
    with pytest.raises(AccelkitError, match=r"runs 6@0\.3.* already; call accelkit\.disable"):
        enable(dit, "full")
    assert enabled_on(dit) is state
    assert torch.equal(run(dit, *call), output)


def test_a_part_and_the_whole_cannot_both_have_a_schedule():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=8,
        transformer_layers_per_block=3,
    )
    inner = unet.down_blocks[1].attentions[0]
    plain = traces(unet)
    with enable(inner, "3@0.5,1@1"):
        before = traces(unet)
        with pytest.raises(AccelkitError, match=r"part of this UNet2D.*, down_blocks\.1\."):
            enable(unet, "uniform:2")
        assert traces(unet) == before
    assert traces(unet) == plain
    with enable(unet, "uniform:2"):
        before = traces(unet)
        with pytest.raises(AccelkitError, match="part of this Transformer2DModel, transformer_blo"):
            enable(inner, "3@0.5,1@1")
        with pytest.raises(AccelkitError, match="BasicTransformerBlock is part of a network"):
            enable(inner.transformer_blocks[2], "uniform:1")
        assert traces(unet) == before
    assert traces(unet) == plain


def test_pipelines_that_give_every_token_a_timestep(dit):
    pipe = SimpleNamespace(  # as Wan 2.2's of 5 billion parameters
        transformer=dit, scheduler=None, config=FrozenDict(expand_timesteps=True)
    )
    before = traces(dit)
    with pytest.raises(AccelkitError, match="a timestep for every token"):
        enable(pipe, "uniform:2")
    assert traces(dit) == before


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_an_enable_that_fails_half_way_leaves_the_model_as_it_was(dit, monkeypatch, kernels):
    before = traces(dit)
    put, done = hooks.put, []

    def put_some(*args):
        if len(done) == 3:
            raise MemoryError("in the middle")
        done.append(put(*args))

    monkeypatch.setattr(hooks, "put", put_some)
    with pytest.raises(MemoryError, match="in the middle"):
        enable(dit, "4@0.5,2@1", kernels=kernels)
    monkeypatch.undo()
    assert traces(dit) == before
    enable(dit, "4@0.5,2@1", kernels=kernels)


def test_disabling_when_off_warns(dit):
    with pytest.warns(AccelkitWarning, match="nothing to disable"):
        disable(dit)


def test_a_model_is_freed_with_its_schedule(dit):
    twin = copy.deepcopy(dit)
    enable(twin, SCHEDULE)
    run(twin, *inputs(MIXED))
    gone = weakref.ref(twin)
    del twin
    gc.collect()
    assert gone() is None


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, "D4", 28, object()])
def test_targets_of_other_types(target):
    for function in (lambda t: enable(t, "D4"), disable, enabled_on):
        with pytest.raises(TypeError, match=f"torch module, got {type(target).__name__}"):
            function(target)


def test_models_of_no_known_family():
    with pytest.raises(AccelkitError, match="no backbone for Linear; it knows DiTTransformer2D"):
        enable(torch.nn.Linear(2, 2), "full")


@pytest.mark.parametrize("schedule", [None, 4, ("D4",), {"D4": 1}])
def test_schedules_of_other_types(dit, schedule):
    with pytest.raises(TypeError, match="schedule is a name"):
        enable(dit, schedule)
    assert enabled_on(dit) is None


def test_schedule_files_are_taken_as_text_and_as_path(dit, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(Schedule.parse(SCHEDULE, 6).to_dict()))
    for given in (str(path), path):
        with enable(dit, given) as state:
            assert state.schedule == Schedule.parse(SCHEDULE, 6)


def test_schedules_for_another_depth(dit):
    with pytest.raises(AccelkitError, match=r"D4 is made for 28 blocks.*has 6.*rescaled\(6\)"):
        enable(dit, Schedule.parse("D4"))
    with pytest.raises(AccelkitError, match="above the model's 6 blocks"):
        enable(dit, "7@0.5,6@1")
    assert enabled_on(dit) is None
    with enable(dit, "D4") as state:  # a name is scaled
        assert state.schedule == Schedule.parse("D4", 6)


def test_schedulers_that_cannot_be_placed_leave_the_model_as_it_was(make_pipe, dit):
    before = traces(dit)
    for scheduler in (KarrasVeScheduler(), "ddim"):
        with pytest.raises(AccelkitError, match="cannot place"):
            enable(dit, SCHEDULE, scheduler=scheduler)
    assert traces(dit) == before
    pipe = make_pipe(scheduler=KarrasVeScheduler())
    with pytest.raises(AccelkitError, match="cannot place"):
        enable(pipe, SCHEDULE)
    with enable(pipe, SCHEDULE, scheduler=DDIMScheduler()) as state:
        assert state.axis.level(500) == 0.5


def test_calls_that_name_no_noise_level(dit):
    latents, timesteps, labels = inputs(MIXED)
    enable(dit, SCHEDULE)
    for call in ((latents, None, labels), (latents,)):
        with pytest.raises(AccelkitError, match="needs its timestep"):
            dit(*call)
    with pytest.raises(AccelkitError, match="between 0"):
        dit(latents, torch.full((4,), torch.nan), labels)
    with pytest.raises(AccelkitError, match="3 timesteps for a batch of 4"):
        dit(latents, timesteps[:3], labels)
    with pytest.raises(AccelkitError, match="4 timesteps for a batch of 2"):
        dit(latents[:2], timesteps, labels[:2])


def test_calls_the_plain_model_refuses_are_refused(dit):
    latents, timesteps, labels = inputs(MIXED)
    wrong = [
        ((latents, timesteps, labels, None, True, "one too many"), {}),
        ((latents, timesteps, labels), {"timestep": timesteps}),
        ((latents,), {"timestep": timesteps, "class_labels": labels, "no_such": 1}),
        ((), {"timestep": timesteps, "class_labels": labels}),
    ]
    enable(dit, SCHEDULE)
    for args, kwargs in wrong:
        with pytest.raises(TypeError):
            inspect.signature(type(dit).forward).bind(dit, *args, **kwargs)
        with pytest.raises(TypeError):
            dit(*args, **kwargs)


@pytest.mark.parametrize("wrong", [torch.tensor([[900], [100]]), torch.tensor([[900, 100]])])
def test_timesteps_in_two_dimensions_are_the_models_to_refuse(dit, wrong):
    latents, _, labels = inputs([900, 100])
    with pytest.raises(AssertionError, match="1d-array"):
        dit(latents, wrong, labels)
    enable(dit, SCHEDULE)
    with pytest.raises(AssertionError, match="1d-array"):
        dit(latents, wrong, labels)


# --- copies and pipelines --------------------------------------------------------------------


def test_a_deep_copy_runs_its_own_weights_under_its_own_schedule(dit):
    call = inputs(MIXED)
    before = traces(dit)
    state = enable(dit, SCHEDULE)
    output = run(dit, *call)
    twin = copy.deepcopy(dit)
    assert enabled_on(dit) is state
    assert enabled_on(twin) is not state
    assert enabled_on(twin).schedule == state.schedule
    assert enabled_on(twin).backbone.model is twin
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.zero_()
    assert not run(dit, *call).any()
    assert torch.equal(run(twin, *call), output)
    disable(dit)
    assert traces(dit) == before
    assert torch.equal(run(twin, *call), output)
    again = copy.deepcopy(twin)  # of a copy
    disable(twin)
    assert not hooked(twin)
    assert torch.equal(run(again, *call), output)
    assert not torch.equal(run(twin, *call), output)


def test_a_copied_pipeline_follows_its_own_scheduler(pipe):
    enable(pipe, SCHEDULE)
    twin = copy.deepcopy(pipe)
    twin.scheduler = FlowMatchEulerDiscreteScheduler()
    assert enabled_on(twin).axis.kind == "flow matching"
    assert enabled_on(pipe).axis.level(500) == 0.5
    pipe.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    assert enabled_on(twin).axis.kind == "flow matching"


def test_pipelines_do_not_affect_each_other(make_pipe):
    one, other = make_pipe(), make_pipe()
    call = inputs(MIXED)
    plain = run(other.transformer, *call)
    enable(one, SCHEDULE)
    assert enabled_on(other) is None
    assert torch.equal(run(other.transformer, *call), plain)
    enable(other, "uniform:3")
    assert torch.equal(
        run(other.transformer, *call), run(truncated(make_pipe().transformer, 3), *call)
    )
    ragged = run(one.transformer, *call)
    disable(other)
    assert torch.equal(run(one.transformer, *call), ragged)
    assert torch.equal(run(other.transformer, *call), plain)


def test_exchanging_the_scheduler_moves_the_axis(pipe):
    model, call = pipe.transformer, inputs([500, 500])
    expected = {depth: run(truncated(model, depth), *call) for depth in (2, 4, 6)}
    state = enable(pipe, SCHEDULE)
    assert torch.equal(run(model, *call), expected[4])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # sigma 0.5 is level 0.26
    assert state.axis.level(500) == pytest.approx(0.258, abs=1e-3)
    assert torch.equal(run(model, *call), expected[6])
    pipe.scheduler = DDIMScheduler()
    assert torch.equal(run(model, *call), expected[4])


def test_a_network_outlives_its_pipeline(make_pipe):
    pipe = make_pipe()
    model, gone = pipe.transformer, weakref.ref(pipe)
    state = enable(pipe, SCHEDULE)
    assert run(model, *inputs([500])).isfinite().all()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    assert state.axis.kind == "flow matching"
    del pipe
    gc.collect()
    assert gone() is None
    assert state.axis.kind == "flow matching"


def test_a_given_scheduler_wins(pipe):
    state = enable(pipe, SCHEDULE, scheduler=FlowMatchEulerDiscreteScheduler())
    assert state.axis.kind == "flow matching"
    pipe.scheduler = DDIMScheduler()
    assert state.axis.kind == "flow matching"


def test_sampling_is_the_cut_network_step_by_step(make_pipe):
    def images(pipe):
        return pipe(
            [3, 7],
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=4,
            output_type="pt",
        ).images

    pipe = make_pipe()
    cut = {depth: truncated(pipe.transformer, depth) for depth in (2, 4, 6)}
    plain = images(pipe)
    with enable(pipe, SCHEDULE):
        routed = images(pipe)
    assert torch.equal(images(pipe), plain)

    class ByHand(torch.nn.Module):
        config, dtype, device = pipe.transformer.config, torch.float32, torch.device("cpu")

        def forward(self, latents, timestep, class_labels):
            depth = Schedule.parse(SCHEDULE, 6).depth_at(timestep[0].item() / 1000)
            return cut[depth](latents, timestep=timestep, class_labels=class_labels)

    expected = make_pipe()
    expected.vae = pipe.vae
    expected.register_modules(transformer=ByHand())
    assert torch.equal(routed, images(expected))
    assert not torch.equal(routed, plain)


def test_a_saved_pipeline_is_a_plain_one(pipe, tmp_path):
    call = inputs(MIXED)
    plain = run(pipe.transformer, *call)
    pipe.save_pretrained(tmp_path / "off")
    enable(pipe, SCHEDULE)
    pipe.save_pretrained(tmp_path / "on")
    files = [
        sorted(f.relative_to(tmp_path / n) for f in (tmp_path / n).rglob("*"))
        for n in ("on", "off")
    ]
    assert files[0] == files[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelkitWarning)
        loaded = DiTPipeline.from_pretrained(tmp_path / "on")
    assert list(loaded.transformer.state_dict()) == list(pipe.transformer.state_dict())
    assert enabled_on(loaded) is None
    assert torch.equal(run(loaded.transformer.eval(), *call), plain)


# --- hooks of others -------------------------------------------------------------------------


class Counting(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class Around(ModelHook):
    """Replaces the forward, as diffusers' caches and layer skipping do."""

    calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


class Places:
    """One hook of a kind on every module where accelkit puts its own."""

    def __init__(self, model, kind):
        self.modules = [model, model.norm_out, *model.transformer_blocks]
        self.hooks = [kind() for _ in self.modules]
        for module, hook in zip(self.modules, self.hooks, strict=True):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "foreign")

    def remove(self):
        for module in self.modules:
            module._diffusers_hook.remove_hook("foreign", recurse=False)

    @property
    def calls(self):
        calls = [hook.calls for hook in self.hooks]
        for hook in self.hooks:
            hook.calls = 0
        return calls


@pytest.mark.parametrize("kind", [Counting, Around])
@pytest.mark.parametrize("foreign_first", [True, False])
@pytest.mark.parametrize("foreign_off_first", [True, False])
def test_hooks_of_others_on_the_same_modules(dit, kind, foreign_first, foreign_off_first):
    call = inputs(MIXED)
    plain, expected = run(dit, *call), by_hand(dit, *call)
    if foreign_first:
        foreign = Places(dit, kind)
        enable(dit, SCHEDULE)
    else:
        enable(dit, SCHEDULE)
        foreign = Places(dit, kind)
    close(run(dit, *call), expected)
    assert foreign.calls[:4] == [1, 1, 1, 1]
    if foreign_off_first:
        foreign.remove()
        close(run(dit, *call), expected)
        assert not any(foreign.calls)
        disable(dit)
    else:
        disable(dit)
        assert torch.equal(run(dit, *call), plain)
        assert foreign.calls == [1] * len(foreign.modules)
        foreign.remove()
    assert torch.equal(run(dit, *call), plain)
    assert not any(foreign.calls)


def test_accelerates_hooks_put_on_later_stay(dit):
    # enable_model_cpu_offload() and its like
    class Placing(AccelerateHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    call, hook = inputs(MIXED), Placing()
    plain = run(dit, *call)
    enable(dit, SCHEDULE)
    add_hook_to_module(dit, hook)
    disable(dit)
    assert torch.equal(run(dit, *call), plain)
    assert hook.calls == 1
    remove_hook_from_module(dit)
    assert torch.equal(run(dit, *call), plain)
