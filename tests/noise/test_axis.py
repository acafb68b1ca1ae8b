"""The noise axis, against what diffusers' schedulers do to a signal and to noise."""

import importlib
import inspect
import math
import pkgutil
import sys
import types
import warnings

import diffusers
import numpy as np
import pytest
import torch

from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis

# log-SNR of the reference process, summed step by step in float64
_ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
REFERENCE = np.log(_ABAR) - np.log(1 - _ABAR)
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def log_snr_at(levels):
    """Return the reference process's log-SNR at noise levels: the inverse of the axis."""
    return np.interp(np.asarray(levels) * 1000, np.arange(1000), REFERENCE)


def assert_same_noise(levels, log_snr):
    """Check that log-SNRs agree where the reference process has them; elsewhere an end is right."""
    levels, log_snr = np.asarray(levels), np.asarray(log_snr)
    inside = (log_snr < REFERENCE[0] - 1e-3) & (log_snr > REFERENCE[-1] + 1e-3)
    assert inside.any()
    np.testing.assert_allclose(log_snr_at(levels)[inside], log_snr[inside], atol=5e-3)
    assert (levels[log_snr >= REFERENCE[0]] == 0).all()
    assert (levels[log_snr < REFERENCE[-1] - 1e-2] == 1).all()


def levels_of(log_snr):
    return np.interp(-np.asarray(log_snr), -REFERENCE, np.arange(1000) / 1000)


def vp_log_snr(betas):
    bar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    with np.errstate(divide="ignore"):
        return np.log(bar) - np.log(1 - bar)


def ratio(signal, noise):
    with np.errstate(divide="ignore"):
        return 2 * (np.log(np.asarray(signal)) - np.log(np.asarray(noise)))


# Measurements of a scheduler: each returns timesteps and the log-SNR of samples there.


def by_add_noise(scheduler):
    """Noise added to a signal of 1 and to nothing, at twelve timesteps."""
    scheduler.set_timesteps(12)
    timesteps = torch.as_tensor(scheduler.timesteps)[:12]
    one = torch.ones(len(timesteps), 1, dtype=torch.float64)
    signal = scheduler.add_noise(one, torch.zeros_like(one), timesteps)
    noise = scheduler.add_noise(torch.zeros_like(one), one, timesteps)
    return timesteps, ratio(signal, noise)[:, 0]


def by_whole_steps(scheduler):
    """As above; every second timestep is halfway within a step."""
    timesteps, log_snr = by_add_noise(scheduler)
    whole = np.asarray(log_snr)[::2]
    return timesteps[:11], np.interp(np.arange(11) / 2, np.arange(6), whole)


def by_scale_noise(scheduler):
    """As above for flow matching."""
    scheduler.set_timesteps(12)
    timesteps = scheduler.timesteps
    one = torch.ones(len(timesteps), 1, dtype=torch.float64)
    signal = scheduler.scale_noise(one, timesteps, torch.zeros_like(one))
    noise = scheduler.scale_noise(torch.zeros_like(one), timesteps, one)
    return timesteps, ratio(signal, noise)[:, 0]


def by_input(scheduler):
    """A run, in which the network's input is divided by the deviation of data and noise."""
    scheduler.set_timesteps(7)
    data = scheduler.config.get("sigma_data", 1.0)
    deviation = []
    for t in scheduler.timesteps:
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        deviation.append(1 / scheduler.scale_model_input(one, t).item())
        scheduler.step(torch.zeros(1, 1, 1, 1), t, torch.zeros(1, 1, 1, 1))
    return scheduler.timesteps, ratio(data, np.sqrt(np.square(deviation) - data**2))


def by_table(scheduler):
    """The products of 1 - beta, at whole timesteps."""
    bar = scheduler.alphas_cumprod.double().numpy()
    return range(len(bar)), ratio(np.sqrt(bar), np.sqrt(1 - bar))


def by_flow_sigmas(scheduler):
    """The share of noise in each of a run's samples."""
    scheduler.set_timesteps(12)
    sigmas = np.asarray(scheduler.sigmas[: len(scheduler.timesteps)], dtype=np.float64)
    return scheduler.timesteps, ratio(1 - sigmas, sigmas)


def by_sigmas(scheduler):
    """The noise on each of a run's samples, whose data keep their scale."""
    scheduler.set_timesteps(12)
    sigmas = np.asarray(scheduler.sigmas[: len(scheduler.timesteps)], dtype=np.float64)
    return scheduler.timesteps, ratio(scheduler.config.get("sigma_data", 1.0), sigmas)


def by_mixture(scheduler):
    """The scheduler's own shares of signal and noise."""
    scheduler.set_timesteps(12)
    count = len(scheduler.timesteps)
    return scheduler.timesteps, ratio(scheduler.alphas[:count], scheduler.betas[:count])


def by_trigflow_step(scheduler):
    """Steps from almost no noise to twelve angles, without noise and with that of a known seed."""
    angles = np.linspace(1.55, 0.05, 12)
    log_snr = []
    for angle in angles:
        ends = []
        for x in (0.0, 1.0):
            scheduler.timesteps = torch.tensor([1e-6, angle], dtype=torch.float64)
            scheduler.num_inference_steps, scheduler._step_index = 1, 0
            sample, zero = torch.full((1,), x, dtype=torch.float64), torch.zeros(1).double()
            rng = torch.Generator().manual_seed(0)
            ends.append(scheduler.step(zero, 1e-6, sample, generator=rng).prev_sample)
        z = torch.randn(1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = abs(ends[0] / z / scheduler.config.sigma_data).item()
        log_snr.append(ratio((ends[1] - ends[0]).item(), noise))
    return angles, log_snr


PLACED = {
    "CMStochasticIterativeScheduler": ({}, by_sigmas),
    "CogVideoXDDIMScheduler": ({}, by_add_noise),
    "CogVideoXDPMScheduler": ({}, by_add_noise),
    "CosineDPMSolverMultistepScheduler": ({}, by_sigmas),
    "DDIMInverseScheduler": ({}, by_table),
    "DDIMParallelScheduler": ({}, by_add_noise),
    "DDIMScheduler": ({}, by_add_noise),
    "DDPMParallelScheduler": ({}, by_add_noise),
    "DDPMScheduler": ({}, by_add_noise),
    "DEISMultistepScheduler": ({}, by_add_noise),
    "DPMSolverMultistepInverseScheduler": ({}, by_add_noise),
    "DPMSolverMultistepScheduler": ({}, by_add_noise),
    "DPMSolverSDEScheduler": ({}, by_whole_steps),
    "DPMSolverSinglestepScheduler": ({}, by_add_noise),
    "EDMDPMSolverMultistepScheduler": ({}, by_input),
    "EDMEulerScheduler": ({}, by_input),
    "EulerAncestralDiscreteScheduler": ({}, by_input),
    "EulerDiscreteScheduler": ({}, by_input),
    "FlowMapEulerDiscreteScheduler": ({"shift": 5.0}, by_scale_noise),
    "FlowMatchEulerDiscreteScheduler": ({"shift": 3.0}, by_scale_noise),
    "FlowMatchHeunDiscreteScheduler": ({}, by_flow_sigmas),
    "FlowMatchLCMScheduler": ({}, by_scale_noise),
    "HeliosDMDScheduler": ({"stages": 1, "stage_range": [0, 1]}, by_flow_sigmas),
    "HeliosScheduler": ({"stages": 1, "stage_range": [0, 1]}, by_flow_sigmas),
    "HeunDiscreteScheduler": ({}, by_input),
    "IPNDMScheduler": ({}, by_mixture),
    "KDPM2AncestralDiscreteScheduler": ({}, by_input),
    "KDPM2DiscreteScheduler": ({}, by_input),
    "LCMScheduler": ({}, by_add_noise),
    "LMSDiscreteScheduler": ({}, by_input),
    "LTXEulerAncestralRFScheduler": ({}, by_flow_sigmas),
    "MiniMaxH3Scheduler": ({}, by_scale_noise),
    "PNDMScheduler": ({}, by_add_noise),
    "PiflowScheduler": ({}, by_flow_sigmas),
    "RePaintScheduler": ({}, by_table),
    "SASolverScheduler": ({}, by_add_noise),
    "SCMScheduler": ({}, by_trigflow_step),
    "TCDScheduler": ({}, by_add_noise),
    "UnCLIPScheduler": ({}, by_add_noise),
    "UniPCMultistepScheduler": ({}, by_add_noise),
}
PROTEINA = {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0}
REFUSED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "BlockRefinementScheduler": {},
    "ConsistencyDecoderScheduler": {},
    "DDPMWuerstchenScheduler": {},
    "DiscreteDDIMScheduler": {},
    "EntropyBoundScheduler": {},
    "HeliosDMDScheduler": {},  # a resolution for each of its stages
    "HeliosScheduler": {},
    "KarrasVeScheduler": {},
    "RFD4ProteinaScheduler": PROTEINA,
    "ScoreSdeVeScheduler": {},
    "ScoreSdeVpScheduler": {},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}


@pytest.fixture(scope="module")
def schedulers():
    """Every scheduler class that diffusers has, by name."""
    if importlib.util.find_spec("torchsde") is None:  # two modules import it for their noise
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    found = {}
    package = diffusers.schedulers
    try:
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            for name, kind in vars(importlib.import_module(module.name)).items():
                if inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin):
                    found[name] = kind
    finally:
        if getattr(sys.modules.get("torchsde"), "__file__", None) is None:
            sys.modules.pop("torchsde", None)
    del found["SchedulerMixin"]
    return found


def made(schedulers, name, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are deprecated
        return schedulers[name](**config)


def test_every_scheduler_is_either_placed_or_refused(schedulers):
    assert set(PLACED) & set(REFUSED) == {"HeliosScheduler", "HeliosDMDScheduler"}
    assert set(schedulers) == set(PLACED) | set(REFUSED)


@pytest.mark.parametrize("name", PLACED)
def test_a_process_is_placed_by_what_its_scheduler_does(schedulers, name):
    config, measured = PLACED[name]
    scheduler = made(schedulers, name, **config)
    axis = NoiseAxis.of(scheduler)  # before its timesteps are set
    timesteps, log_snr = measured(scheduler)
    assert_same_noise(axis.levels(timesteps), log_snr)


@pytest.mark.parametrize("name", REFUSED)
def test_a_process_that_cannot_be_placed_is_refused(schedulers, name):
    with pytest.raises(AccelkitError, match=f"^cannot place {name} on the noise axis: .*pass sch"):
        NoiseAxis.of(made(schedulers, name, **REFUSED[name]))


@pytest.mark.parametrize("other", [object(), "ddim", 1000])
def test_other_objects_are_refused(other):
    with pytest.raises(AccelkitError, match=f"cannot place {type(other).__name__}"):
        NoiseAxis.of(other)


@pytest.mark.parametrize(
    "name",
    ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
def test_linear_betas_are_the_axis_itself(name):
    axis = NoiseAxis.of(getattr(diffusers, name)(**LINEAR))
    assert axis.levels(range(1000)) == [i / 1000 for i in range(1000)]
    assert [axis.level(i) for i in (0, 200, 600, 999)] == [0.0, 0.2, 0.6, 0.999]


def test_no_scheduler_is_the_reference_process():
    axis = NoiseAxis.of(None)
    assert axis.levels(torch.arange(1000)) == [i / 1000 for i in range(1000)]
    assert axis.level(1000) == axis.level(5000) == 0.999
    assert axis.level(-1) == 0


def test_timesteps_come_in_any_container():
    axis = NoiseAxis.of(None)
    for steps in ([100, 250.5], (100, 250.5), np.array([100, 250.5]), torch.tensor([100, 250.5])):
        assert axis.levels(steps) == [0.1, 0.2505]
    assert axis.levels(torch.tensor(300)) == [0.3]
    assert axis.levels([]) == []


@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_other_betas_are_placed_by_log_snr(schedule):
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule)
    levels = NoiseAxis.of(scheduler).levels(range(1000))
    assert_same_noise(levels, vp_log_snr(scheduler.betas.double().numpy()))
    assert levels == sorted(levels)
    assert levels[500] != 0.5


def test_stable_diffusions_betas_by_hand():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    wanted = vp_log_snr(betas)[500]
    sd = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    level = NoiseAxis.of(diffusers.DDIMScheduler(**sd)).level(500)
    below = int(np.sum(wanted < REFERENCE)) - 1
    part = (REFERENCE[below] - wanted) / (REFERENCE[below] - REFERENCE[below + 1])
    assert level == pytest.approx((below + part) / 1000, abs=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_zero_terminal_snr_is_pure_noise(name):
    scheduler = getattr(diffusers, name)(**LINEAR, rescale_betas_zero_snr=True)
    axis = NoiseAxis.of(scheduler)
    assert axis.level(999) == 1.0
    levels = axis.levels(range(1000))
    assert levels == sorted(levels)
    assert all(map(math.isfinite, levels))
    assert_same_noise(levels[:999], vp_log_snr(scheduler.betas.double().numpy())[:999])


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_a_process_shifted_behind_its_betas_is_placed_by_its_products(name):
    make = getattr(diffusers, name)
    betas = vp_log_snr(make().betas.double().numpy())
    for scale in (1.0, 2.0, 3.0):  # the signal's share of the power falls by so much
        levels = NoiseAxis.of(make(snr_shift_scale=scale)).levels(range(1000))
        assert_same_noise(levels, betas - np.log(scale))
    rescaled = make(rescale_betas_zero_snr=True)
    levels = NoiseAxis.of(rescaled).levels(range(1000))
    assert levels[999] == 1
    assert_same_noise(levels[:999], by_table(rescaled)[1][:999])


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_repeated_and_fractional_timesteps_lie_between_whole_ones(name):
    scheduler = getattr(diffusers, name)(**LINEAR)
    scheduler.set_timesteps(7)
    steps = scheduler.timesteps.tolist()
    assert len(steps) == 13
    assert any(not float(s).is_integer() for s in steps)
    axis = NoiseAxis.of(scheduler)
    assert axis.levels(scheduler.timesteps) == pytest.approx([s / 1000 for s in steps], abs=2e-6)
    assert axis.level(500.25) == pytest.approx(0.50025, abs=1e-6)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(
    "name",
    [
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_other_spacings_differ_from_their_sigmas_by_the_schedulers_rounding(name, spacing):
    scheduler = getattr(diffusers, name)(**LINEAR, **{f"use_{spacing}_sigmas": True})
    timesteps, log_snr = by_sigmas(scheduler)
    levels = np.array(NoiseAxis.of(scheduler).levels(timesteps))
    assert len(set(levels)) > 8
    # they cast their timesteps to whole ones
    np.testing.assert_allclose(levels, levels_of(log_snr), atol=1.01e-3)


@pytest.mark.parametrize(
    "name",
    [
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverSinglestepScheduler",
        "SASolverScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_flow_sigmas_of_a_vp_sampler_are_flow_matching(name):
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = getattr(diffusers, name)(**config)
    axis = NoiseAxis.of(scheduler)
    assert axis.level(775) == pytest.approx(0.5, abs=1e-3)
    timesteps, log_snr = by_flow_sigmas(scheduler)
    # whole timesteps are at most one off, which is most of the way where there is no noise
    steps = np.array([t for t in timesteps.tolist() if t > 10])
    noise = 1 / (1 + np.exp(np.asarray(log_snr) / 2))[timesteps.numpy() > 10]
    np.testing.assert_allclose(steps / 1000, noise, atol=1.01e-3)
    assert_same_noise(axis.levels(steps), ratio(1 - steps / 1000, steps / 1000))


def test_an_option_of_another_class_is_not_read():
    flow = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)
    scheduler = diffusers.DDIMScheduler.from_config(flow.config)
    assert scheduler.config.use_flow_sigmas  # stored by diffusers, without effect on DDIM
    assert NoiseAxis.of(scheduler).level(775) == 0.775


def test_the_published_correspondence():
    # DiT's index 500: abar 0.0778, log-SNR -2.47, as much noise as flow matching at 0.775
    assert REFERENCE[500] == pytest.approx(-2.47, abs=5e-3)
    flow = NoiseAxis.of(diffusers.FlowMatchEulerDiscreteScheduler())
    assert flow.level(775) == pytest.approx(0.5, abs=1e-3)
    assert flow.level(1000) == 1
    assert flow.level(0) == 0


@pytest.mark.parametrize(
    ("config", "run"),
    [
        ({"use_dynamic_shifting": True}, {"mu": 1.15}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 3.0}),
        ({"shift": 3.0, "shift_terminal": 0.1}, {}),
        ({"use_karras_sigmas": True}, {}),
        ({"shift": 3.0}, {"sigmas": [1.0, 0.9, 0.5, 0.1]}),
    ],
)
def test_a_shift_changes_what_is_visited_but_not_what_it_means(config, run):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    steps = {} if "sigmas" in run else {"num_inference_steps": 12}
    scheduler.set_timesteps(**steps, **run)
    sigmas = scheduler.sigmas[:-1].double().numpy()
    levels = NoiseAxis.of(scheduler).levels(scheduler.timesteps)
    assert_same_noise(levels, ratio(1 - sigmas, sigmas))
    assert levels == sorted(levels, reverse=True)
    assert NoiseAxis.of(scheduler).level(775) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_inverted_sigmas_run_from_noise_to_data(name):
    scheduler = getattr(diffusers, name)(invert_sigmas=True)
    scheduler.set_timesteps(12)
    steps = scheduler.timesteps
    levels = NoiseAxis.of(scheduler).levels(steps)
    # a run begins in noise, and its sigmas are the shares of data
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == 1
    data = scheduler.sigmas[:-1].double().numpy()
    assert_same_noise(levels, ratio(data, 1 - data))


def test_a_derived_class_is_placed_as_the_one_it_derives_from():
    class Mine(diffusers.FlowMatchEulerDiscreteScheduler):
        pass

    assert NoiseAxis.of(Mine()).kind == "flow matching"


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_placed_by_its_sigma_and_the_datas_deviation(name, sigma_data):
    scheduler = getattr(diffusers, name)(sigma_data=sigma_data)
    timesteps, log_snr = by_sigmas(scheduler)
    levels = NoiseAxis.of(scheduler).levels(timesteps)
    assert_same_noise(levels, log_snr)
    assert levels == sorted(levels, reverse=True)


def test_stable_video_diffusions_timesteps_are_logarithms():
    config = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    scheduler = diffusers.EulerDiscreteScheduler(**config, use_karras_sigmas=True)
    assert_same_noise(
        NoiseAxis.of(scheduler).levels(scheduler.timesteps[::50]), by_start(scheduler)
    )
    timesteps, log_snr = by_sigmas(scheduler)
    assert timesteps[0] < 3
    assert_same_noise(NoiseAxis.of(scheduler).levels(timesteps), log_snr)
    # only together do the two options change what the network is given
    epsilon = diffusers.EulerDiscreteScheduler(**LINEAR, timestep_type="continuous")
    assert NoiseAxis.of(epsilon).level(500) == 0.5


def by_start(scheduler):
    return ratio(1, scheduler.sigmas[:-1:50].double().numpy())


def test_trigflow_is_placed_by_its_angle_alone():
    for sigma_data in (0.5, 1.0):
        axis = NoiseAxis.of(diffusers.SCMScheduler(sigma_data=sigma_data))
        # equal parts of data and noise
        assert axis.level(math.pi / 4) == pytest.approx(float(levels_of(0.0)), abs=1e-5)
        assert axis.level(1.5708) == 1  # where Sana-Sprint starts, beyond pi / 2
        assert axis.level(0) == 0
