"""Every sampler's steps: the published updates in float64, a Gaussian's exact denoiser."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from accelkit.noise.vp_sde import VPSDEScheduler
from accelkit.sample import sampler_for
from accelkit.sample.samplers import make_sampler
from accelkit.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own

ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
MEAN, SPREAD = 0.5, 0.4
SPACINGS = [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)]
COUNTS = [1, 2, 3, 7, 10, 61, 333, 600, 999]  # 61 of "trailing" come out as 62 in diffusers


def visited(spacing, offset, steps):
    """Lin et al. 2023, table 2, for the 1,000 timesteps 0 to 999."""
    if spacing == "leading":
        return [offset + 1000 // steps * i for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(t) for t in np.linspace(0, 999, steps)[::-1]]
    return [int(np.round((steps - i) * 1000 / steps)) - 1 for i in range(steps)]


def saved(kind, folder, **config):
    """A scheduler as it comes from a repository, where every setting is written out."""
    kind(**config).save_pretrained(folder)
    return kind.from_pretrained(folder)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ends(timesteps):
    """Each timestep's share of data, and the next one's: all of it at the end."""
    here = ABAR[timesteps]
    return list(zip(here, [*here[1:], 1.0], strict=True))


def near(found, expected):
    found, expected = found.double().numpy(), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def parts(kind, output, x, here):
    """Data and noise that a network's output stands for (Salimans and Ho 2022, appendix D)."""
    a, b = here**0.5, (1 - here) ** 0.5
    if kind == "epsilon":
        return (x - b * output) / a, output
    if kind == "sample":
        return output, (x - a * output) / b
    return a * x - b * output, a * output + b * x


# --- the updates, step by step ---------------------------------------------------------------


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_is_song_et_al_eq_12(spacing, offset, steps, kind):
    base = DPMSolverMultistepScheduler(
        timestep_spacing=spacing, steps_offset=offset, prediction_type=kind
    )
    sampler = sampler_for(Subject(None, None, base), "auto", steps)
    timesteps = visited(spacing, offset, steps)
    assert sampler.timesteps.tolist() == timesteps
    for i, (here, after) in list(enumerate(ends(timesteps)))[-40:]:
        x, output = draw(2, 1, 4, 2, 2, seed=i)
        x0, eps = parts(kind, output.double().numpy(), x.double().numpy(), here)
        stepped = sampler.step(output, sampler.timesteps[i], x).prev_sample
        near(stepped, after**0.5 * x0 + (1 - after) ** 0.5 * eps)


@pytest.mark.parametrize("steps", [1, 3, 61, 600])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_sampling_is_ho_et_al_algorithm_2(spacing, offset, steps, learned):
    """With the variance of Nichol and Dhariwal 2021, eq. 15, if the network learned one."""
    base = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, clip_sample=False)
    sampler = make_sampler("ddpm", base, steps, learned)
    timesteps = visited(spacing, offset, steps)
    assert sampler.timesteps.tolist() == timesteps
    for i, (here, after) in list(enumerate(ends(timesteps)))[-20:]:
        x, eps, v = draw(3, 1, 4, 2, 2, seed=i)
        output = torch.cat([eps, v], dim=1) if learned else eps
        rng = torch.Generator().manual_seed(9)
        stepped = sampler.step(output, sampler.timesteps[i], x, generator=rng).prev_sample
        x, eps, v, z = (p.double().numpy() for p in (x, eps, v, draw(1, 4, 2, 2, seed=9)))
        x0 = (x - (1 - here) ** 0.5 * eps) / here**0.5
        if i == steps - 1:
            near(stepped, x0)
            continue
        beta = 1 - here / after
        least = (1 - after) / (1 - here) * beta
        mean = after**0.5 * beta * x0 + (here / after) ** 0.5 * (1 - after) * x
        share = (v + 1) / 2 if learned else 0.0
        near(stepped, mean / (1 - here) + (beta**share * least ** (1 - share)) ** 0.5 * z)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 61, 300])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_dpm_is_lu_et_al_algorithm_2(spacing, steps, kind):
    """DPM-Solver++(2M), of first order where there is no earlier step and where noise ends."""
    base = DDIMScheduler(timestep_spacing=spacing, prediction_type=kind)
    sampler = sampler_for(Subject(None, None, base), "dpm", steps)
    timesteps = sampler.timesteps.tolist()
    assert len(timesteps) == steps
    assert timesteps[-1] >= 0
    half_log_snr = np.log(ABAR / (1 - ABAR)) / 2
    x, before = draw(1, 4, 2, 2, seed=99), None
    for i, (here, after) in enumerate(ends(timesteps)):
        output, given = draw(1, 4, 2, 2, seed=i), x.double().numpy()
        x0, _ = parts(kind, output.double().numpy(), given, here)
        x = sampler.step(output, sampler.timesteps[i], x).prev_sample
        if i == steps - 1:
            near(x, x0)
            break
        h = half_log_snr[timesteps[i + 1]] - half_log_snr[timesteps[i]]
        corrected = x0
        if before is not None and not (steps < 15 and i == steps - 1):
            r = (half_log_snr[timesteps[i]] - half_log_snr[timesteps[i - 1]]) / h
            corrected = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        ratio = ((1 - after) / (1 - here)) ** 0.5
        near(x, ratio * given - after**0.5 * np.expm1(-h) * corrected)
        before = x0


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_eulers_method(steps, shift):
    base = FlowMatchEulerDiscreteScheduler(shift=shift)
    sampler = make_sampler("flow", base, steps)
    s = sampler.timesteps.double().numpy() / 1000
    assert s[0] == 1
    x = draw(1, 4, 2, 2, seed=99)
    for i, width in enumerate(np.diff([*s, 0.0])):
        output, given = draw(1, 4, 2, 2, seed=i), x.double().numpy()
        x = sampler.step(output, sampler.timesteps[i], x).prev_sample
        near(x, given + width * output.double().numpy())


@pytest.mark.parametrize("original", [0.0, 1.0])
def test_the_noise_that_an_offset_ends_at(original):
    """Stable Diffusion's last step goes to the noise of timestep 0, not to none."""
    base = PNDMScheduler(steps_offset=1, set_alpha_to_one=bool(original))
    sampler = make_sampler("ddim", base, 4)
    assert sampler.timesteps.tolist() == [751, 501, 251, 1]
    after = 1.0 if original else ABAR[0]
    x, eps = draw(2, 1, 4, 2, 2)
    stepped = sampler.step(eps, sampler.timesteps[-1], x).prev_sample
    x, eps = x.double().numpy(), eps.double().numpy()
    x0, _ = parts("epsilon", eps, x, ABAR[1])
    near(stepped, after**0.5 * x0 + (1 - after) ** 0.5 * eps)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_where_diffusers_own_is_right(steps):
    """Bit for bit, in the spacing that the figures of DiT are of."""
    theirs = DDIMScheduler(clip_sample=False)
    theirs.set_timesteps(steps)
    ours = make_sampler("ddim", theirs, steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = draw(1, 4, 2, 2)
    for i, t in enumerate(theirs.timesteps):
        eps = draw(1, 4, 2, 2, seed=i)
        x, y = (s.step(eps, t, v).prev_sample for s, v in ((ours, x), (theirs, y)))
        assert torch.equal(x, y)
    assert ours.num_inference_steps == steps


# --- a Gaussian ------------------------------------------------------------------------------


def weights(flow, timestep):
    """What a sample at a timestep has of data and of noise."""
    if flow:
        return 1 - timestep / 1000, timestep / 1000
    abar = np.interp(timestep, np.arange(1000), ABAR)
    return abar**0.5, (1 - abar) ** 0.5


def denoised(x, a, b):
    """The mean of the data given x = a data + b noise, of N(MEAN, SPREAD^2)."""
    return MEAN + a * SPREAD**2 / ((a * SPREAD) ** 2 + b**2) * (x - a * MEAN)


def sampled(sampler, x):
    """What becomes of ``x`` with the exact denoiser as network."""
    flow, x = "FlowMatch" in type(sampler).__name__, torch.tensor(x).view(-1, 1, 1, 1)
    for t in sampler.timesteps:
        a, b = weights(flow, float(t))
        data = denoised(x, a, b)
        noise = (x - a * data) / b
        x = sampler.step(noise - data if flow else noise, t, x).prev_sample.double()
    return x.flatten().numpy()


def error(sampler):
    """How far off the flow's own end the sampler ends, at most, from three starts."""
    start = np.array([-1.0, 0.0, 1.5])
    a, b = weights("FlowMatch" in type(sampler).__name__, float(sampler.timesteps[0]))
    exact = MEAN + SPREAD * (start - a * MEAN) / ((a * SPREAD) ** 2 + b**2) ** 0.5
    return np.abs(sampled(sampler, start) - exact).max()


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["ddim", "dpm", "dpm-fast"])
def test_convergence(name, spacing):
    base = DPMSolverMultistepScheduler(timestep_spacing=spacing)
    errors = [error(make_sampler(name, base, steps)) for steps in (10, 40, 160)]
    # a fourth of the width: a fourth of the error in first order, a sixteenth in second
    assert errors[0] < 0.21
    assert errors[1] < errors[0] / (3.5 if name == "ddim" else 14)
    assert errors[2] < (0.014 if name == "ddim" else 0.002)
    assert error(make_sampler(name, base, 600)) < (0.0045 if name == "ddim" else 0.002)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_convergence_of_flow_matching(shift):
    base = FlowMatchEulerDiscreteScheduler(shift=shift)
    errors = [error(make_sampler("flow", base, steps)) for steps in (10, 40, 160, 1000)]
    assert errors[0] < 0.21
    assert all(b < a / 3.5 for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("steps", [5, 10, 50])
def test_linspace_of_a_saved_scheduler(kind, steps, tmp_path):
    """Against the map by which eq. 12 takes the noise at timestep 999 to data."""
    base = saved(kind, tmp_path, timestep_spacing="linspace")
    assert base.config.timestep_spacing == "linspace"
    x = np.array([0.0, 1.0])
    found = sampled(make_sampler("auto", base, steps), x)
    timesteps = visited("linspace", 0, steps)
    for here, after in ends(timesteps):
        data = denoised(x, here**0.5, (1 - here) ** 0.5)
        x = after**0.5 * data + ((1 - after) / (1 - here)) ** 0.5 * (x - here**0.5 * data)
    assert found == pytest.approx(x, abs=2e-4)


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_moments_of_ancestral_sampling(spacing, offset):
    """The exact denoiser gives the data's, the spread less what the smaller variance lacks."""
    base = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset, clip_sample=False)
    sampler = make_sampler("ddpm", base, 250)
    a, b = weights(False, float(sampler.timesteps[0]))
    x = a * (MEAN + SPREAD * draw(1, 20_000, seed=1)) + b * draw(1, 20_000, seed=2)
    rng = torch.Generator().manual_seed(3)
    for t in sampler.timesteps:
        a, b = weights(False, float(t))
        noise = (x - a * denoised(x, a, b)) / b
        x = sampler.step(noise, t, x, generator=rng).prev_sample
    assert x.mean().item() == pytest.approx(MEAN, abs=0.012)
    assert x.std().item() == pytest.approx(SPREAD, abs=0.02)


@pytest.mark.parametrize("steps", [61, 600])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm"])
def test_the_continuous_process_at_any_count(name, steps):
    """Its timesteps are rounded evenly from 999 on, and none is -1."""
    sampler = make_sampler(name, VPSDEScheduler(), steps)
    assert sampler.timesteps.tolist() == visited("trailing", 0, steps)


def test_a_learned_variance_is_the_pipelines_own_choice():
    """A scheduler that fixes the variance is asked before a network that learned one."""
    from test_generate import build

    for scheduler, kind in (
        (DDIMScheduler(clip_sample=False), "learned_range"),
        (DDPMScheduler(clip_sample=False, variance_type="learned"), "learned_range"),
        (DDPMScheduler(clip_sample=False), "fixed_small"),
        (DDPMScheduler(clip_sample=False, variance_type="fixed_large"), "fixed_large"),
    ):
        assert sampler_for(build(scheduler), "ddpm", 4).config.variance_type == kind
    assert sampler_for(build(learned=False), "ddpm", 4).config.variance_type == "fixed_small"
