"""The noise axis, against what diffusers' schedulers do to a signal and to noise."""

import math
import warnings

import diffusers
import numpy as np
import pytest
import torch

from accelkit.errors import AccelkitError
from accelkit.noise import NoiseAxis

# log-SNR of the reference process, summed step by step in float64
_ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
REFERENCE = np.log(_ABAR) - np.log(1 - _ABAR)
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def log_snr_at(levels):
    """What the reference process has at these noise levels: the axis read backwards."""
    return np.interp(np.asarray(levels) * 1000, np.arange(1000), REFERENCE)


def assert_same_noise(levels, log_snr):
    """Equal log-SNR wherever the reference process reaches it, an end of the axis elsewhere."""
    levels, log_snr = np.asarray(levels), np.asarray(log_snr)
    inside = (log_snr < REFERENCE[0] - 1e-3) & (log_snr > REFERENCE[-1] + 1e-3)
    assert inside.any()
    np.testing.assert_allclose(log_snr_at(levels)[inside], log_snr[inside], atol=5e-3)
    assert (levels[log_snr >= REFERENCE[0]] == 0).all()
    assert (levels[log_snr < REFERENCE[-1] - 1e-2] == 1).all()


def vp_log_snr(betas):
    bar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    with np.errstate(divide="ignore"):
        return np.log(bar) - np.log(1 - bar)


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


def test_zero_terminal_snr_is_pure_noise():
    scheduler = diffusers.DDIMScheduler(**LINEAR, rescale_betas_zero_snr=True)
    axis = NoiseAxis.of(scheduler)
    assert axis.level(999) == 1.0
    levels = axis.levels(range(1000))
    assert levels == sorted(levels)
    assert all(map(math.isfinite, levels))
    assert_same_noise(levels[:999], vp_log_snr(scheduler.betas.double().numpy())[:999])


def test_heuns_fractional_timesteps_lie_between_whole_ones():
    scheduler = diffusers.HeunDiscreteScheduler(**LINEAR)
    scheduler.set_timesteps(7)
    steps = scheduler.timesteps.tolist()
    assert any(not float(s).is_integer() for s in steps)
    axis = NoiseAxis.of(scheduler)
    assert axis.levels(scheduler.timesteps) == pytest.approx([s / 1000 for s in steps], abs=2e-6)
    assert axis.level(500.25) == pytest.approx(0.50025, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
    ],
)
def test_flow_matching_is_placed_by_what_it_mixes(name, config):
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(12)
    steps = scheduler.timesteps
    sigma = np.clip(scheduler.sigmas[: len(steps)].double().numpy(), 1e-12, 1 - 1e-12)
    levels = NoiseAxis.of(scheduler).levels(steps)
    assert_same_noise(levels, 2 * np.log((1 - sigma) / sigma))
    assert levels == sorted(levels, reverse=True)


def test_the_published_correspondence():
    # DiT's index 500: abar 0.0778, log-SNR -2.47, as much noise as flow matching at 0.775
    assert REFERENCE[500] == pytest.approx(-2.47, abs=5e-3)
    flow = NoiseAxis.of(diffusers.FlowMatchEulerDiscreteScheduler())
    assert flow.level(775) == pytest.approx(0.5, abs=1e-3)
    assert flow.level(1000) == 1
    assert flow.level(0) == 0


def test_flow_sigmas_of_a_vp_sampler_are_flow_matching():
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    assert NoiseAxis.of(scheduler).level(775) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_placed_by_its_sigma_and_the_datas_deviation(name, sigma_data):
    scheduler = getattr(diffusers, name)(sigma_data=sigma_data)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas[:10].double().numpy()
    levels = NoiseAxis.of(scheduler).levels(scheduler.timesteps)
    assert_same_noise(levels, 2 * np.log(sigma_data / sigmas))
    assert levels == sorted(levels, reverse=True)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("SCMScheduler", {}),  # timesteps are radians
        ("CMStochasticIterativeScheduler", {}),  # timesteps are 250 log(sigma)
        ("ConsistencyDecoderScheduler", {}),
        ("IPNDMScheduler", {}),  # its betas are sines of the sampling steps
        ("KarrasVeScheduler", {}),
        ("ScoreSdeVeScheduler", {}),
        ("DDPMWuerstchenScheduler", {}),
        # Stable Video Diffusion's: betas in the config, but timesteps are log(sigma) / 4
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        ),
    ],
)
def test_a_process_that_cannot_be_placed_is_refused(name, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are deprecated
        module = diffusers if hasattr(diffusers, name) else diffusers.schedulers
        scheduler = getattr(module, name)(**config)
    with pytest.raises(AccelkitError, match=f"cannot place {name}"):
        NoiseAxis.of(scheduler)


@pytest.mark.parametrize("other", [object(), "ddim", 1000])
def test_what_is_no_scheduler_is_refused(other):
    with pytest.raises(AccelkitError, match=f"cannot place {type(other).__name__}"):
        NoiseAxis.of(other)
