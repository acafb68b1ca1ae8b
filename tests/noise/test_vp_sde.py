"""Samplers of the continuous VP SDE, against its closed form, its equations and diffusers."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, DPMSolverSinglestepScheduler
from scipy.integrate import quad

from accelkit.errors import AccelkitError
from accelkit.models.uvit import PUBLISHED, UViTTransformer2DModel
from accelkit.models.uvit_pipeline import UViTPipeline
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.vp_sde import VPSDEDPMSolverScheduler, VPSDEEulerMaruyamaScheduler

BOTH = [VPSDEEulerMaruyamaScheduler, VPSDEDPMSolverScheduler]
BINS = [0, 0.2, 0.4, 0.6, 0.8, 1 + 1e-9]


def beta(t):
    return 0.1 + 19.9 * t


def alpha_bar(t):
    return np.exp(-0.1 * t - 9.95 * np.square(t))


def log_snr(t):
    return np.log(alpha_bar(t)) - np.log(1 - alpha_bar(t))


def times(sampler):
    """Where the network is called, in t from 0 to 1."""
    return (sampler.timesteps.double().numpy() + 1) / 1000


def run(sampler, network, x, **options):
    for t in sampler.timesteps:
        x = sampler.step(network(x, t), t, x, **options).prev_sample
    return x


def exact_noise(spread):
    """What the best network predicts for data of zero mean and this deviation."""

    def network(x, timestep):
        bar = alpha_bar((float(timestep) + 1) / 1000)
        return math.sqrt(1 - bar) * x / (bar * spread**2 + 1 - bar)

    return network


def curved(x, timestep):
    """A network as good as any other for comparing two solvers."""
    return torch.sin(3 * x) + 0.2 * math.cos(0.01 * float(timestep)) * x


@pytest.mark.parametrize("kind", BOTH)
def test_signal_is_what_the_rate_integrates_to(kind):
    sampler = kind()
    for t in (1e-3, 0.2, 0.7, 1.0):
        assert sampler.log_alpha_bar(t) == pytest.approx(-quad(beta, 0, t)[0], rel=1e-9)
    wide = kind(beta_min=0.5, beta_max=6.0)
    assert wide.log_alpha_bar(0.5) == pytest.approx(-quad(lambda t: 0.5 + 5.5 * t, 0, 0.5)[0])


def test_discrete_betas_have_its_noise_at_every_index():
    betas = np.array(VPSDEEulerMaruyamaScheduler().discrete_betas())
    assert betas.shape == (1000,)
    np.testing.assert_allclose(np.cumprod(1 - betas), alpha_bar(np.arange(1, 1001) / 1000))
    # the linear betas of which it is the limit
    np.testing.assert_allclose(betas, np.linspace(1e-4, 0.02, 1000), rtol=0.12, atol=2e-4)


def test_noise_is_added_by_the_marginal():
    sampler = VPSDEEulerMaruyamaScheduler()
    x0, eps = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    steps = torch.tensor([-0.9, 0.0, 333.3, 999.0])
    bar = torch.tensor(alpha_bar((steps.double().numpy() + 1) / 1000)).view(-1, 1, 1, 1)
    noisy = sampler.add_noise(x0, eps, steps)
    torch.testing.assert_close(noisy, bar.sqrt() * x0 + (1 - bar).sqrt() * eps)
    one = sampler.add_noise(x0, eps, steps[2])
    torch.testing.assert_close(one, bar[2].sqrt() * x0 + (1 - bar[2]).sqrt() * eps)
    assert sampler.add_noise(x0.half(), eps.half(), steps).dtype == torch.half


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("config", [{}, {"beta_max": 12.0}])
def test_place_on_the_axis(kind, config):
    sampler = kind(**config)
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    reference = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    reference = np.log(reference) - np.log(1 - reference)
    for step in (20.0, 150.5, 499.0, 998.9):
        where = torch.tensor([step]).double()
        signal = sampler.add_noise(one, zero, where) / sampler.add_noise(zero, one, where)
        level = NoiseAxis.of(sampler).level(step)
        expected = np.interp(-2 * math.log(signal.item()), -reference, np.arange(1000) / 1000)
        assert level == pytest.approx(float(expected), abs=2e-6)
    # its limit is the axis: a timestep is never further from its index than half a percent
    steps = np.arange(1000)
    if not config:
        levels = np.array(NoiseAxis.of(sampler).levels(steps))
        assert np.abs(levels - steps / 1000).max() < 5e-3


# Euler-Maruyama


def test_euler_maruyama_calls_at_every_whole_timestep_of_a_thousand():
    sampler = VPSDEEulerMaruyamaScheduler()
    sampler.set_timesteps(1000)
    torch.testing.assert_close(sampler.timesteps, torch.arange(999.0, -1, -1), atol=1e-4, rtol=0)
    counts = np.histogram(NoiseAxis.of(sampler).levels(sampler.timesteps), BINS)[0]
    assert (np.abs(counts - 200) <= 3).all()


@pytest.mark.parametrize("steps", [2, 5, 100])
def test_euler_maruyama_grid(steps):
    sampler = VPSDEEulerMaruyamaScheduler()
    sampler.set_timesteps(steps)
    wanted = np.linspace(1e-3, 1, steps)[::-1]
    np.testing.assert_allclose(times(sampler), wanted, atol=1e-7)
    assert sampler.num_inference_steps == len(sampler.timesteps) == steps
    assert sampler.timesteps.dtype == torch.float32


def test_euler_maruyama_against_its_equation():
    """Drift and diffusion of the reverse SDE, step by step in float64."""
    steps, shape = 7, (2, 3, 2, 2)
    sampler = VPSDEEulerMaruyamaScheduler()
    sampler.set_timesteps(steps)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    ran = run(sampler, curved, x, generator=torch.Generator().manual_seed(2))

    rng = torch.Generator().manual_seed(2)
    grid = np.concatenate([[0.0], np.linspace(1e-3, 1, steps)])[::-1]
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        score = -curved(x, sampler.timesteps[i]) / math.sqrt(1 - alpha_bar(t))
        x = x + (-beta(t) / 2 * x - beta(t) * score) * (s - t)
        if s > 0:
            z = torch.randn(shape, generator=rng, dtype=torch.float64)
            x = x + math.sqrt(beta(t)) * math.sqrt(t - s) * z
    torch.testing.assert_close(ran, x, rtol=1e-9, atol=1e-9)


def test_the_last_step_adds_no_noise():
    sampler = VPSDEEulerMaruyamaScheduler()
    x, ends = torch.randn(1, 1, 4, 4), []
    for seed in (0, 1):
        sampler.set_timesteps(3)
        sampler.set_begin_index(2)
        rng = torch.Generator().manual_seed(seed)
        ends.append(sampler.step(x, sampler.timesteps[2], x, generator=rng).prev_sample)
        assert rng.get_state().equal(torch.Generator().manual_seed(seed).get_state())
    assert torch.equal(*ends)


def test_euler_maruyama_ends_in_the_data():
    sampler = VPSDEEulerMaruyamaScheduler()
    sampler.set_timesteps(500)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, generator=rng)
    x = run(sampler, exact_noise(0.3), x, generator=rng)
    assert x.std().item() == pytest.approx(0.3, rel=0.03)
    assert x.mean().item() == pytest.approx(0, abs=0.01)


def test_a_sample_depends_on_its_generator_alone():
    def sample(seeds):
        sampler = VPSDEEulerMaruyamaScheduler()
        sampler.set_timesteps(5)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return run(sampler, curved, torch.ones(len(seeds), 3, 2, 2), generator=generators)

    torch.testing.assert_close(sample([4, 5, 6])[1:2], sample([5]))
    assert not torch.equal(sample([5]), sample([6]))


# DPM-Solver


@pytest.mark.parametrize(("steps", "counts"), [(50, [24, 5, 5, 7, 9]), (25, [11, 3, 2, 4, 5])])
def test_calls_at_each_level_as_the_paper_spends_them(steps, counts):
    sampler = VPSDEDPMSolverScheduler()
    sampler.set_timesteps(steps)
    assert np.histogram(times(sampler), BINS)[0].tolist() == counts
    levels = NoiseAxis.of(sampler).levels(sampler.timesteps)
    assert np.histogram(levels, BINS)[0].tolist() == counts


@pytest.mark.parametrize("steps", [*range(1, 20), 50, 200])
def test_as_many_calls_as_asked_in_intervals_even_in_log_snr(steps):
    sampler = VPSDEDPMSolverScheduler()
    sampler.set_timesteps(steps)
    t = np.append(times(sampler), 1e-4)
    assert len(t) == steps + 1
    assert (np.diff(t) < 0).all()
    assert t[0] == 1
    intervals = steps // 3 + 1
    width = (log_snr(1e-4) - log_snr(1.0)) / intervals
    whole = [3] * (intervals - 1) + [steps % 3]
    if steps % 3 == 0:
        whole = [3] * (intervals - 2) + [2, 1]
    at, ends = 0, [0]
    for calls in whole:
        at += calls
        ends.append(at)
        inner = log_snr(t[at - calls : at + 1])
        np.testing.assert_allclose(np.diff(inner), width / calls, rtol=2e-3)
    assert at == steps


def reference_run(sampler, x):
    """diffusers' single-step solver on the same noise levels.

    Its second order within the third has to be the exact form, elsewhere the midpoint rule.
    """
    options = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    other = DPMSolverSinglestepScheduler(solver_order=3, lower_order_final=True, **options)
    steps = len(sampler.timesteps)
    other.set_timesteps(steps)
    other.sigmas = torch.tensor(np.exp(-log_snr(np.array(sampler._times)) / 2))
    other.timesteps = sampler.timesteps.double()
    full, rest = divmod(steps, 3)
    inner = [1, 2, 3] * (full if rest else full - 1)
    other.order_list = inner + {0: [1, 2, 1], 1: [1], 2: [1, 2]}[rest]
    for i, timestep in enumerate(other.timesteps):
        exact = other.order_list[i] == 2 and other.order_list[i + 1 : i + 2] == [3]
        other.register_to_config(solver_type="heun" if exact else "midpoint")
        x = other.step(curved(x, timestep), timestep, x).prev_sample
    return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 11, 25])
def test_dpm_solver_against_diffusers_on_the_same_noise(steps):
    sampler = VPSDEDPMSolverScheduler()
    sampler.set_timesteps(steps)
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    ran = run(sampler, curved, x)
    torch.testing.assert_close(ran, reference_run(sampler, x), rtol=1e-7, atol=1e-7)


def test_dpm_solver_is_of_third_order():
    """On data of a known spread the flow keeps x over its deviation as it is."""

    def error(steps):
        sampler = VPSDEDPMSolverScheduler()
        sampler.set_timesteps(steps)
        spread = [np.sqrt(alpha_bar(t) * 0.25 + 1 - alpha_bar(t)) for t in (1.0, 1e-4)]
        # float64 times, since timesteps of float32 cost the order at the end
        x = torch.ones(1, dtype=torch.float64)
        for t in sampler._times[:-1]:
            step = 1000 * t - 1
            x = sampler.step(exact_noise(0.5)(x, step), step, x).prev_sample
        return abs(x.item() * spread[0] / spread[1] - 1)

    errors = [error(steps) for steps in (25, 49, 97)]
    assert errors[0] < 1e-2
    assert errors[0] / errors[1] > 6
    assert errors[1] / errors[2] > 6


def test_the_order_shows():
    """Fifty calls of it are closer to the flow's end than 50 of the first order."""
    coarse = VPSDEDPMSolverScheduler()
    coarse.set_timesteps(50)
    coarse._starts = [True] * 50  # every call its own interval
    fine = VPSDEDPMSolverScheduler()
    fine.set_timesteps(50)
    expected = 0.5 / math.sqrt(alpha_bar(1.0) * 0.25 + 1 - alpha_bar(1.0))
    ends = [run(s, exact_noise(0.5), torch.ones(1).double()).item() for s in (coarse, fine)]
    assert abs(ends[1] / expected - 1) < abs(ends[0] / expected - 1) / 30


@pytest.mark.parametrize("first", range(7))
def test_a_run_may_begin_within_an_interval(first):
    sampler = VPSDEDPMSolverScheduler()
    sampler.set_timesteps(30)
    sampler.set_begin_index(first)
    t = times(sampler)[first]
    assert sampler.begin_index == first
    x = torch.full((1,), math.sqrt(alpha_bar(t) * 0.25 + 1 - alpha_bar(t))).double()
    for step in sampler.timesteps[first:]:
        x = sampler.step(exact_noise(0.5)(x, step), step, x).prev_sample
    assert x.item() == pytest.approx(0.5, rel=0.02)


# Both


@pytest.mark.parametrize("kind", BOTH)
def test_a_run_is_found_by_its_first_timestep(kind):
    sampler = kind()
    sampler.set_timesteps(10)
    x = torch.ones(1, 1, 2, 2)
    rng = torch.Generator().manual_seed(0)
    sampler.step(x, sampler.timesteps[4].bfloat16(), x, generator=rng)
    assert sampler.step_index == 5
    sampler.set_timesteps(10)
    assert sampler.step_index is None


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_of_the_sample(kind, dtype):
    sampler = kind()
    sampler.set_timesteps(4)
    x = run(sampler, lambda x, t: 0.1 * x, torch.ones(1, 1, 2, 2, dtype=dtype))
    assert x.dtype == dtype
    assert x.isfinite().all()
    scaled = sampler.scale_model_input(x, 3)
    assert scaled is x


@pytest.mark.parametrize("kind", BOTH)
def test_tuple_and_errors(kind):
    sampler = kind()
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(AccelkitError, match="call set_timesteps"):
        sampler.step(x, 999, x)
    sampler.set_timesteps(2)
    assert isinstance(sampler.step(x, sampler.timesteps[0], x, return_dict=False), tuple)
    sampler.step(x, sampler.timesteps[1], x)
    with pytest.raises(AccelkitError, match="no step is left"):
        sampler.step(x, 0, x)


@pytest.mark.parametrize(
    ("kind", "steps", "least"),
    [(BOTH[0], 1, "at least 2 steps, got 1"), (BOTH[1], 0, "at least 1 step, got 0")],
)
def test_too_few_steps(kind, steps, least):
    with pytest.raises(AccelkitError, match=least):
        kind().set_timesteps(steps)


@pytest.mark.parametrize("kind", BOTH)
def test_saved_and_loaded(kind, tmp_path, make_pipe):
    sampler = kind(beta_max=12.0)
    sampler.save_pretrained(tmp_path / "alone")
    loaded = kind.from_pretrained(tmp_path / "alone")
    assert (loaded.config.beta_min, loaded.config.beta_max) == (0.1, 12)
    make_pipe(2, scheduler=sampler).save_pretrained(tmp_path / "pipe")
    pipe = DiTPipeline.from_pretrained(tmp_path / "pipe")
    assert type(pipe.scheduler) is kind
    assert pipe.scheduler.config.beta_max == 12


@pytest.mark.parametrize("kind", BOTH)
def test_a_uvit_is_given_999_times_t(kind):
    """What the original's network was trained with, also between whole timesteps."""
    time = {k: v for k, v in PUBLISHED["celeba64-s4"].items() if k.startswith("timestep")}
    model = UViTTransformer2DModel(
        sample_size=8,
        patch_size=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        **time,
    ).eval()
    given = []
    model.register_forward_pre_hook(lambda module, args: given.append(float(args[1])))
    pipe = UViTPipeline(model, kind())
    pipe.set_progress_bar_config(disable=True)
    image = pipe(num_inference_steps=5, output_type="pt", generator=torch.Generator()).images
    assert image.isfinite().all()
    fresh = kind()
    fresh.set_timesteps(5)
    np.testing.assert_allclose(given, 999 * times(fresh), rtol=1e-5)
    assert given[0] == pytest.approx(999)
