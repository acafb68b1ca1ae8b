"""Depth schedules under noise schedulers of every kind, in sampling loops and pipelines."""

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KarrasVeScheduler,
)

from accelkit.compute import Compute
from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.vp_sde import VPSDEDPMSolverScheduler, VPSDEEulerMaruyamaScheduler
from accelkit.runtime.switch import enable, enabled_on
from accelkit.runtime.timesteps import place_in
from accelkit.schedule import Schedule

SCHEDULE = "6@0.3,4@0.6,2@1"  # of the six blocks of `dit`
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULERS = {
    "DDIMScheduler": LINEAR,
    "DDPMScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "EDMEulerScheduler": {},
    "EulerDiscreteScheduler": {"beta_schedule": "scaled_linear"},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {},
    "HeunDiscreteScheduler": LINEAR,
    "KDPM2DiscreteScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "VPSDEDPMSolverScheduler": {},
    "VPSDEEulerMaruyamaScheduler": {},
}
# KDPM2 is slow to build and takes the same path as Heun.
MOST = [name for name in SCHEDULERS if name != "KDPM2DiscreteScheduler"]
OWN = {kind.__name__: kind for kind in (VPSDEDPMSolverScheduler, VPSDEEulerMaruyamaScheduler)}


def make(name):
    return (OWN.get(name) or getattr(diffusers, name))(**SCHEDULERS[name])


def depths(levels):
    schedule = Schedule.parse(SCHEDULE, 6)
    return [schedule.depth_at(level) for level in levels]


class Depths:
    """Counts the blocks that each call of a DiT runs."""

    def __init__(self, model):
        self.calls = []
        model.register_forward_pre_hook(lambda module, args: self.calls.append(0))
        for block in model.transformer_blocks:
            block.attn1.register_forward_hook(self.count)

    def count(self, module, args, output):
        self.calls[-1] += 1

    def pop(self):
        calls, self.calls[:] = list(self.calls), []
        return calls


@pytest.fixture
def ran(dit):
    return Depths(dit)


@torch.no_grad()
def denoise(model, scheduler, timesteps, dtype=None, x=None):
    """Run a pipeline's sampling loop, possibly from a timestep in the middle."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) if x is None else x
    label = torch.zeros(len(x), dtype=torch.long)
    rng = torch.Generator().manual_seed(0)
    stochastic = "generator" in scheduler.step.__code__.co_varnames
    for t in timesteps:
        timestep = t.expand(len(x)).to(dtype or t.dtype)
        scaled = x
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, t)
        eps = model(scaled, timestep=timestep, class_labels=label).sample[:, :4]
        options = {"generator": rng} if stochastic else {}
        x = scheduler.step(0.1 * eps, t, x, **options).prev_sample
    return x


def run_length(scheduler, steps=10):
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


# --- any scheduler, from the start or from the middle ----------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_call_runs_the_depth_of_its_noise_level(dit, ran, name):
    scheduler = make(name)
    enable(dit, SCHEDULE, scheduler=scheduler)
    timesteps = run_length(scheduler)
    assert denoise(dit, scheduler, timesteps).isfinite().all()
    calls = ran.pop()
    assert calls == depths(NoiseAxis.of(scheduler).levels(timesteps))
    assert set(calls) == {2, 4, 6}
    assert calls == sorted(calls)  # deeper towards the data


@pytest.mark.parametrize("strength", [0.3, 0.8])
@pytest.mark.parametrize("name", MOST)
def test_image_to_image_starts_in_the_middle(dit, ran, name, strength):
    """The timesteps left decide, not their position in the run."""
    scheduler = make(name)
    enable(dit, SCHEDULE, scheduler=scheduler)
    whole = run_length(scheduler)
    first = (10 - int(10 * strength)) * scheduler.order
    rest = whole[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    denoise(dit, scheduler, rest)
    calls = ran.pop()
    assert calls == depths(NoiseAxis.of(scheduler).levels(whole))[first:]


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_timestep_is_recognised_as_one_of_a_run_that_starts_in_the_middle(name):
    """By its place in the storage, since on a GPU reading its value would wait."""
    scheduler = make(name)
    whole = run_length(scheduler)
    for i, t in enumerate(whole[4:]):
        assert place_in(t, whole) == 4 + i
        assert place_in(t.expand(3), whole) == 4 + i
    assert place_in(whole[4:][1].clone(), whole) is None
    halves = whole[::2]
    assert place_in(whole[2], halves) == 1
    assert place_in(whole[3], halves) is None


def test_a_shift_moves_calls_to_more_noise(dit, ran):
    """Static or by resolution: the samples have more noise, so the same schedule runs less."""
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    plain = FlowMatchEulerDiscreteScheduler()
    spent = []
    for scheduler, options in ((plain, {}), (static, {}), (dynamic, {"mu": 1.15})):
        with enable(dit, SCHEDULE, scheduler=scheduler):
            scheduler.set_timesteps(12, **options)
            denoise(dit, scheduler, scheduler.timesteps)
        calls = ran.pop()
        sigmas = scheduler.sigmas[:-1] * 1000
        assert calls == depths(NoiseAxis.of(plain).levels(sigmas))
        spent.append(sum(calls))
    assert spent[0] > spent[1] > 0
    assert spent[0] > spent[2] > 0


# --- another scheduler on an enabled pipeline ------------------------------------------------


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", *OWN])
def test_a_pipeline_runs_with_another_scheduler(make_pipe, name):
    pipe = make_pipe()
    ran = Depths(pipe.transformer)
    enable(pipe, SCHEDULE)
    for scheduler in (pipe.scheduler, make(name), DDIMScheduler()):
        pipe.scheduler = scheduler
        pipe([1], num_inference_steps=9, output_type="latent", guidance_scale=2.0)
        calls = ran.pop()
        assert calls == depths(NoiseAxis.of(scheduler).levels(scheduler.timesteps))
        assert len(calls) == 9


def test_a_scheduler_that_cannot_be_placed_is_refused_at_the_next_call(make_pipe):
    pipe = make_pipe()
    call = {"timestep": torch.tensor([500]), "class_labels": torch.tensor([1])}
    enable(pipe, SCHEDULE)
    before = pipe.transformer(torch.ones(1, 4, 8, 8), **call).sample
    known, pipe.scheduler = pipe.scheduler, KarrasVeScheduler()
    with pytest.raises(AccelkitError, match="cannot place KarrasVeScheduler on the noise axis"):
        pipe.transformer(torch.ones(1, 4, 8, 8), **call)
    pipe.scheduler = known
    assert torch.equal(pipe.transformer(torch.ones(1, 4, 8, 8), **call).sample, before)
    assert enabled_on(pipe) is not None


def test_a_scheduler_that_cannot_be_placed_is_refused_before_anything_runs(make_dit):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = DiTPipeline(make_dit(), vae, KarrasVeScheduler())
    with pytest.raises(AccelkitError, match="cannot place KarrasVeScheduler"):
        enable(pipe, SCHEDULE)
    assert enabled_on(pipe) is None


# --- several calls per step ------------------------------------------------------------------


def test_two_calls_per_step_are_both_as_deep_as_one_of_twice_the_batch(dit, ran):
    """Guidance by separate calls, as in U-ViT's and some video pipelines."""
    scheduler = DDIMScheduler()
    enable(dit, SCHEDULE, scheduler=scheduler)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    label, null = torch.tensor([3]), torch.tensor([1000])
    for t in run_length(scheduler, 6):
        apart = [dit(x, timestep=t[None], class_labels=y).sample for y in (label, null)]
        first, second = ran.pop()
        joint = dit(
            torch.cat([x, x]), timestep=t.expand(2), class_labels=torch.cat([label, null])
        ).sample
        assert ran.pop() == [first] == [second]
        torch.testing.assert_close(torch.cat(apart), joint, atol=2e-5, rtol=1e-5)
        assert first == depths([t.item() / 1000])[0]


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_heuns_second_call_has_the_noise_of_the_next_step(dit, ran, name):
    scheduler = make(name)
    enable(dit, SCHEDULE, scheduler=scheduler)
    steps = run_length(scheduler, 8)
    denoise(dit, scheduler, steps)
    calls = ran.pop()
    assert len(calls) == 15  # two a step, except for the last
    # the second call of a step and the first of the next see the same timestep
    assert calls[1:-1:2] == calls[2::2]
    assert len(set(calls)) == 3
    assert steps[1:-1:2].equal(steps[2::2])


def test_heun_in_a_pipeline(make_pipe):
    pipe = make_pipe(scheduler=HeunDiscreteScheduler(**LINEAR))
    ran = Depths(pipe.transformer)
    enable(pipe, SCHEDULE)
    pipe([1], num_inference_steps=5, output_type="latent", guidance_scale=1.0)
    assert ran.pop() == depths([s / 1000 for s in pipe.scheduler.timesteps.tolist()])


# --- half precision --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOST)
def test_half_precision_moves_no_timestep_over_an_edge(dit, name):
    """In bfloat16 whole numbers above 512 are four apart."""
    scheduler = make(name)
    timesteps = run_length(scheduler, 40)
    exact, rounded = (NoiseAxis.of(scheduler).levels(t) for t in (timesteps, timesteps.bfloat16()))
    # edges between a timestep and its rounded value, where the two differ most
    pairs = sorted(zip(exact, rounded, strict=True), key=lambda pair: -abs(pair[0] - pair[1]))
    assert abs(pairs[0][0] - pairs[0][1]) > 1e-4
    low, high = sorted(sum(pair) / 2 for pair in pairs[:: len(pairs) // 4][:2])
    schedule = Schedule((low, high, 1.0), (Compute(6), Compute(4), Compute(2)), 6)
    wanted = [schedule.depth_at(level) for level in exact]
    assert wanted != [schedule.depth_at(level) for level in rounded]

    router = enable(dit, schedule, scheduler=scheduler)._router
    for t, depth in zip(timesteps, wanted, strict=True):
        for given in (t.expand(2).bfloat16(), t.bfloat16(), t.half()):
            assert [p.plan.depth for p in router.passes(given, 2, narrows=True)] == [depth]


def test_an_edge_in_half_precision(dit, ran):
    scheduler = DDIMScheduler()
    scheduler.timesteps = torch.tensor([999, 599, 298, 100])
    enable(dit, SCHEDULE, scheduler=scheduler)
    x, label = torch.ones(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    for t in scheduler.timesteps:
        dit(x, timestep=t[None].bfloat16(), class_labels=label)
    assert ran.pop() == [2, 4, 6, 6]


def test_a_rounded_timestep_of_no_run_keeps_its_value(dit, ran):
    """Four steps are set; a call at another noise level is not one of them."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(4)  # 750, 500, 250, 0
    enable(dit, SCHEDULE, scheduler=scheduler)
    x, label = torch.ones(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
    for t in (640.0, 340.0, 200.0):  # nearest to 750, 250 and 250
        dit(x, timestep=torch.tensor([t], dtype=torch.bfloat16), class_labels=label)
    assert ran.pop() == [2, 4, 6]


def test_timesteps_of_half_precision_in_one_batch(dit, ran):
    scheduler = DDIMScheduler()
    run_length(scheduler, 50)
    enable(dit, SCHEDULE, scheduler=scheduler)
    timesteps = torch.tensor([960, 300, 580, 20])
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4)
    with torch.no_grad():
        exact = dit(x, timestep=timesteps, class_labels=labels).sample
        parts = [
            dit(x[i : i + 1], timestep=timesteps[i : i + 1], class_labels=labels[i : i + 1]).sample
            for i in range(4)
        ]
    torch.testing.assert_close(exact, torch.cat(parts), atol=2e-5, rtol=1e-5)
    state = enabled_on(dit)
    whole = state._router.passes(timesteps, 4, narrows=True)[0].plan
    half = state._router.passes(timesteps.bfloat16(), 4, narrows=True)[0].plan
    assert half == whole
    assert whole.active == (4, 4, 3, 3, 1, 1)
