"""Samplers by name: the process they keep, and what they refuse."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)

from accelkit.errors import AccelkitError
from accelkit.sample.samplers import SAMPLERS, make_sampler

ORIGINALS = {
    "ddim": DDIMScheduler(clip_sample=False),
    "ddpm": DDPMScheduler(clip_sample=False),
    "dpm": DPMSolverMultistepScheduler(),
    "sde": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "learned": DDPMScheduler(clip_sample=False, variance_type="learned_range"),
    "euler": EulerDiscreteScheduler(),
}


def ends(sampler, eps=0.1):
    """What a network that always predicts ``eps`` turns noise of 1 into."""
    x = torch.ones(1, 4, 2, 2) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        x = sampler.step(torch.full_like(x, eps), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 999])
def test_steps(name, steps):
    sampler = make_sampler(name, ORIGINALS["ddim"], steps)
    assert type(sampler).__name__ == SAMPLERS[name]
    assert len(set(sampler.timesteps.tolist())) == len(sampler.timesteps) == steps
    assert (sampler.timesteps.diff() < 0).all()


@pytest.mark.parametrize("name", ["ddim", "dpm"])
@pytest.mark.parametrize("steps", [1, 2, 250, 999, 1000])
def test_result_is_finite(name, steps):
    """Also with as many steps as the process has, unless these are refused."""
    try:
        sampler = make_sampler(name, ORIGINALS["ddim"], steps)
    except AccelkitError:
        assert (name, steps) == ("dpm", 1000)
    else:
        assert ends(sampler).isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_original_is_left_alone_and_its_process_kept(name):
    original = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=1e-3, clip_sample=False, num_train_timesteps=400
    )
    before = dict(original.config)
    sampler = make_sampler(name, original, 20)
    assert dict(original.config) == before
    assert original.num_inference_steps is None
    torch.testing.assert_close(sampler.alphas_cumprod, original.alphas_cumprod)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_the_process_does_not_have(name, steps):
    with pytest.raises(AccelkitError, match=f"^{steps} sampling steps asked for; give 1 to "):
        make_sampler(name, ORIGINALS["ddim"], steps)


def test_steps_of_a_short_process():
    with pytest.raises(AccelkitError, match=r"give 1 to 100$"):
        make_sampler("ddim", DDIMScheduler(num_train_timesteps=100), 101)


def test_unknown_sampler():
    with pytest.raises(AccelkitError, match=r"unknown sampler 'euler'; known: ddpm, ddim, dpm"):
        make_sampler("euler", ORIGINALS["ddim"], 10)


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_never_clipped_unasked(name, original):
    """Whichever scheduler the pipeline came with; latents go far beyond 1."""
    assert not make_sampler(name, ORIGINALS[original], 10).config.clip_sample


def test_clipping_is_kept_where_the_pipeline_asks_for_it():
    assert make_sampler("ddpm", DDIMScheduler(clip_sample=True), 10).config.clip_sample


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize(("learned", "kind"), [(True, "learned_range"), (False, "fixed_small")])
def test_variance_of_ancestral_sampling(original, learned, kind):
    sampler = make_sampler("ddpm", ORIGINALS[original], 10, learned)
    assert sampler.variance_type == sampler.config.variance_type == kind


@pytest.mark.parametrize("original", ORIGINALS)
def test_dpm_is_the_deterministic_solver(original):
    sampler = make_sampler("dpm", ORIGINALS[original], 10)
    assert sampler.config.algorithm_type == "dpmsolver++"
    assert torch.equal(ends(sampler), ends(make_sampler("dpm", ORIGINALS[original], 10)))


def test_ddim_step_against_its_equation():
    sampler = make_sampler("ddim", ORIGINALS["ddim"], 4)
    assert sampler.timesteps.tolist() == [750, 500, 250, 0]
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    x, eps = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    x0 = (x - (1 - abar[500]).sqrt() * eps) / abar[500].sqrt()
    expected = abar[250].sqrt() * x0 + (1 - abar[250]).sqrt() * eps
    stepped = sampler.step(eps.float(), sampler.timesteps[1], x.float()).prev_sample
    torch.testing.assert_close(stepped.double(), expected, rtol=1e-4, atol=1e-5)
