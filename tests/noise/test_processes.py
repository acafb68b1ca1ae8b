"""Forward processes against diffusers' schedulers and closed forms in float64."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
)
from scipy import stats

from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.processes import (
    Density,
    DiscreteProcess,
    FlowProcess,
    VPSDEProcess,
)
from accelkit.noise.schedulers import forward_process
from accelkit.noise.vp_sde import VPSDEScheduler
from accelkit.train.objectives import denoising_loss

SHAPE = (3, 2, 2)
BETAS = {
    "linear": {"beta_schedule": "linear"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "shifted": {"snr_shift_scale": 3.0},  # the products of 1 - beta alone
}
KINDS = {"shifted": CogVideoXDDIMScheduler}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def drawn(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, *SHAPE, generator=rng)


@pytest.mark.parametrize("betas", BETAS)
def test_noise_is_added_as_the_scheduler_adds_it(betas):
    t = torch.tensor([0, 1, 250, 700, 999])
    x0, eps = drawn(len(t))
    scheduler = KINDS.get(betas, DDIMScheduler)(**BETAS[betas])
    ours = forward_process(scheduler).add_noise(x0, eps, t)
    torch.testing.assert_close(ours, scheduler.add_noise(x0, eps, t), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("betas", BETAS)
def test_the_target_v_is_the_schedulers(betas):
    t = torch.tensor([0, 1, 250, 700, 999])
    x0, eps = drawn(len(t))
    make = KINDS.get(betas, DDIMScheduler)
    scheduler = make(**BETAS[betas], prediction_type="v_prediction")
    ours = forward_process(scheduler).target(x0, eps, t)
    torch.testing.assert_close(ours, scheduler.get_velocity(x0, eps, t), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_perfect_prediction_gives_the_data(predicts):
    """Compared with the conversion in the scheduler's ``step``."""
    scheduler = DDPMScheduler(prediction_type=predicts, clip_sample=False)
    process = forward_process(scheduler)
    for step in (0, 10, 500):
        t = torch.tensor([step])
        x0, eps = drawn(1, seed=step)
        xt = process.add_noise(x0, eps, t)
        target = process.target(x0, eps, t)
        assert denoising_loss(process, target, x0, eps, xt, t).item() == 0
        torch.testing.assert_close(process.data_of(target, xt, t), x0, rtol=1e-3, atol=1e-4)
        output = target + 0.1
        theirs = scheduler.step(output, step, xt).pred_original_sample
        torch.testing.assert_close(process.data_of(output, xt, t), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_one_learned_variance_whatever_is_predicted(predicts):
    """Predictions of the same data have the same variational term."""
    t = torch.tensor([0, 3, 400])
    x0, eps = drawn(3)
    plain = DiscreteProcess(DDIMScheduler().betas)
    other = DiscreteProcess(DDIMScheduler().betas, predicts=predicts)
    xt = plain.add_noise(x0, eps, t)
    guess = eps + 0.2
    data = plain.data_of(guess, xt, t)
    converted = other.target(data, guess, t)
    v = 0.3 * torch.ones_like(x0)
    losses = [
        denoising_loss(p, torch.cat([out, v], dim=1), x0, eps, xt, t)
        - denoising_loss(p, out, x0, eps, xt, t)
        for p, out in ((plain, guess), (other, converted))
    ]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=1e-3)


def test_flow_matching_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = scheduler.timesteps[[0, 100, 500, 999]]
    x0, eps = drawn(4)
    process = forward_process(scheduler)
    xt = process.add_noise(x0, eps, t)
    torch.testing.assert_close(xt, scheduler.scale_noise(x0, t, eps), rtol=1e-5, atol=1e-6)
    target = process.target(x0, eps, t)
    torch.testing.assert_close(target, eps - x0)
    torch.testing.assert_close(process.data_of(target, xt, t), x0, rtol=1e-4, atol=1e-5)
    loss = denoising_loss(process, target + 2, x0, eps, xt, t)
    torch.testing.assert_close(loss, torch.full((4,), 4.0))


def test_the_end_points_of_the_straight_path():
    process = FlowProcess()
    x0, eps = drawn(2)
    xt = process.add_noise(x0, eps, torch.tensor([0.0, 1000.0]))
    assert torch.equal(xt[0], x0[0])
    assert torch.equal(xt[1], eps[1])


def closed_form(timesteps):
    """sqrt(abar) and sqrt(1 - abar) of the VP SDE in float64."""
    t = (np.asarray(timesteps, dtype=np.float64) + 1) / 1000
    integral = 0.1 * t + 9.95 * t**2
    return np.exp(-integral / 2), np.sqrt(-np.expm1(-integral))


def test_the_continuous_process_against_its_closed_form():
    timesteps = [-1.0, -0.999, -0.5, 0.0, 123.456, 700.25, 999.0]
    process = forward_process(VPSDEScheduler())
    a, b = process.coefficients(torch.tensor(timesteps))
    signal, noise = closed_form(timesteps)
    np.testing.assert_allclose(a, signal, rtol=2e-6)
    np.testing.assert_allclose(b, noise, rtol=2e-4, atol=1e-7)  # t + 1 of float32 near -1
    x0, eps = drawn(len(timesteps))
    theirs = VPSDEScheduler().add_noise(x0, eps, torch.tensor(timesteps))
    ours = process.add_noise(x0, eps, torch.tensor(timesteps))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(process.target(x0, eps, torch.tensor(timesteps)), eps)


def test_the_continuous_process_draws_all_of_it():
    timesteps = VPSDEProcess().draw(4000, torch.Generator().manual_seed(0))
    assert stats.kstest((timesteps.double() + 1) / 1000, "uniform").pvalue > 0.01
    assert timesteps.min() < 0  # below the first whole step: no cut


def test_whole_timesteps_are_uniform():
    process = forward_process(DDIMScheduler(num_train_timesteps=4))
    timesteps = process.draw(4000, torch.Generator().manual_seed(0))
    assert timesteps.dtype == torch.int64
    assert stats.chisquare(np.bincount(timesteps, minlength=4)).pvalue > 0.01


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6)])
def test_logit_normal(mean, std):
    process = FlowProcess(density=Density("logit-normal", mean, std))
    s = process.draw(4000, torch.Generator().manual_seed(0)).double().numpy() / 1000
    normal = stats.norm(mean, std)
    assert stats.kstest(np.log(s) - np.log1p(-s), normal.cdf).pvalue > 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_positions_are_shifted_like_the_schedulers(shift):
    """A uniform draw, shifted, fills the scheduler's own timesteps evenly."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    drawn = forward_process(scheduler).draw(4000, torch.Generator().manual_seed(0))
    theirs = np.sort(scheduler.timesteps.numpy())
    evenly = stats.kstest(np.searchsorted(theirs, drawn.numpy()) / 1000, "uniform")
    assert evenly.pvalue > 0.01


def test_where_a_shift_is_read():
    flow = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction"
    )
    assert forward_process(flow).shift == 5.0
    moving = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    assert forward_process(moving).shift == 1.0


SCHEDULERS = [DDIMScheduler(), VPSDEScheduler(), FlowMatchEulerDiscreteScheduler(shift=2.0)]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_a_timestep_means_the_same_noise_to_the_axis(scheduler):
    process, reference = forward_process(scheduler), DiscreteProcess(DDIMScheduler().betas)
    timesteps = process.draw(50, torch.Generator().manual_seed(1))
    levels = torch.tensor(NoiseAxis.of(scheduler).levels(timesteps))
    a, b = (c.double() for c in process.coefficients(timesteps))
    log_snr = 2 * (a.log() - b.log())
    table = 2 * (reference._tables["signal"].double() / reference._tables["noise"]).log()
    expected = np.interp(-log_snr, -table, np.arange(1000) / 1000)
    inside = (log_snr < table[0]) & (log_snr > table[-1])
    assert inside.sum() > 30
    np.testing.assert_allclose(levels[inside], expected[inside], atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (EDMEulerScheduler(), "EDMEulerScheduler is not"),
        (SCMScheduler(), "SCMScheduler is not"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "flow matching towards noise"),
        (object(), "object is not"),
    ],
)
def test_processes_that_cannot_be_trained(scheduler, match):
    with pytest.raises(AccelkitError, match=match) as caught:
        forward_process(scheduler)
    assert "\n" not in str(caught.value)


def test_a_prediction_that_is_not_known():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(AccelkitError, match="prediction_type 'score'"):
        forward_process(scheduler)


@pytest.mark.parametrize("scheduler", SCHEDULERS[:2], ids=lambda s: type(s).__name__)
def test_a_density_is_one_of_flow_matching(scheduler):
    with pytest.raises(AccelkitError, match="logit-normal, which needs flow matching"):
        forward_process(scheduler, density=Density("logit-normal"))


def test_a_variance_needs_discrete_steps():
    x0, eps = drawn(1)
    t = torch.tensor([300.0])
    with pytest.raises(AccelkitError, match="discrete steps"):
        denoising_loss(FlowProcess(), torch.zeros(1, 6, 2, 2), x0, eps, x0, t)


def test_numbers_stay_finite_at_zero_terminal_snr():
    scheduler = DDIMScheduler(**BETAS["zero"], prediction_type="v_prediction")
    process = forward_process(scheduler)
    x0, eps = drawn(1)
    t = torch.tensor([999])
    xt = process.add_noise(x0, eps, t)
    torch.testing.assert_close(xt, eps, atol=1e-5, rtol=0)
    torch.testing.assert_close(process.target(x0, eps, t), -x0, atol=1e-5, rtol=0)
    assert math.isfinite(denoising_loss(process, xt, x0, eps, xt, t).item())
