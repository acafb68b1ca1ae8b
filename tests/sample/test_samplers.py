"""Samplers by name: the process they keep, and what they refuse."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)

from accelkit.errors import AccelkitError
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.vp_sde import VPSDEDPMSolverScheduler, VPSDEEulerMaruyamaScheduler
from accelkit.sample import sampler_for
from accelkit.sample.samplers import SAMPLERS, STOCHASTIC, make_sampler
from accelkit.subject import Subject

BETAS = ["ddpm", "ddim", "dpm", "dpm-fast"]

ORIGINALS = {
    "ddim": DDIMScheduler(clip_sample=False),
    "ddpm": DDPMScheduler(clip_sample=False),
    "dpm": DPMSolverMultistepScheduler(),
    "sde": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "learned": DDPMScheduler(clip_sample=False, variance_type="learned_range"),
    "euler": EulerDiscreteScheduler(),
}
OF = {"em": VPSDEEulerMaruyamaScheduler(), "flow": FlowMatchEulerDiscreteScheduler()}


def original(name):
    """A pipeline's scheduler that the sampler is for."""
    return OF.get(name, ORIGINALS["ddim"])


def ends(sampler, eps=0.1):
    """What a network that always predicts ``eps`` turns noise of 1 into."""
    x = torch.ones(1, 4, 2, 2) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        x = sampler.step(torch.full_like(x, eps), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 10, 50, 999])
def test_steps(name, steps):
    sampler = make_sampler(name, original(name), steps)
    assert type(sampler).__name__ == SAMPLERS[name]
    assert len(set(sampler.timesteps.tolist())) == len(sampler.timesteps) == steps
    assert (sampler.timesteps.diff() < 0).all()


@pytest.mark.parametrize("name", BETAS)
def test_a_single_step(name):
    sampler = make_sampler(name, ORIGINALS["ddim"], 1)
    assert len(sampler.timesteps) == 1
    assert ends(sampler).isfinite().all()


@pytest.mark.parametrize("name", ["ddim", "dpm", "dpm-fast"])
@pytest.mark.parametrize("steps", [1, 2, 3, 250, 999, 1000])
def test_result_is_finite(name, steps):
    """Also with as many steps as the process has, unless these are refused."""
    try:
        sampler = make_sampler(name, ORIGINALS["ddim"], steps)
    except AccelkitError:
        assert name != "ddim"
        assert steps == 1000
    else:
        assert ends(sampler).isfinite().all()


@pytest.mark.parametrize("name", BETAS)
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
        make_sampler(name, original(name), steps)


def test_steps_of_a_short_process():
    with pytest.raises(AccelkitError, match=r"give 1 to 100$"):
        make_sampler("ddim", DDIMScheduler(num_train_timesteps=100), 101)


@pytest.mark.parametrize(
    ("name", "scheduler", "steps", "most"),
    [
        ("ddim", PNDMScheduler(steps_offset=1), 1000, 999),  # timestep 1000 is beyond the process
        ("ddpm", PNDMScheduler(steps_offset=1), 1000, 999),
        ("ddpm", PNDMScheduler(steps_offset=1), 1001, 999),
        ("dpm", PNDMScheduler(steps_offset=1, timestep_spacing="leading"), 999, 998),
        ("dpm", PNDMScheduler(steps_offset=1, timestep_spacing="leading"), 1000, 998),
        ("ddim", PNDMScheduler(steps_offset=5, timestep_spacing="leading"), 200, 199),
        ("ddim", DDIMScheduler(num_train_timesteps=100, steps_offset=1), 100, 99),
        # intervals without a width, where the noise that may be visited ends early
        (
            "dpm",
            DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1),
            998,
            995,
        ),
    ],
)
def test_the_highest_count(name, scheduler, steps, most):
    with pytest.raises(
        AccelkitError, match=rf"^{steps} sampling steps asked for; give 1 to {most}$"
    ):
        make_sampler(name, scheduler, steps)
    sampler = make_sampler(name, scheduler, most)
    assert len(sampler.timesteps) == most
    assert sampler.timesteps.max() < len(sampler.alphas_cumprod)
    assert ends(sampler).isfinite().all()


def test_one_step_of_sigmas_that_are_stretched():
    flow = FlowMatchEulerDiscreteScheduler(shift_terminal=0.1)
    with pytest.raises(AccelkitError, match=r"shift_terminal.* give at least 2 steps, got 1"):
        make_sampler("flow", flow, 1)
    assert make_sampler("flow", flow, 2).timesteps.tolist() == pytest.approx([1000, 100])


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_pure_noise_of_which_a_prediction_of_noise_says_nothing(name):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(AccelkitError, match=f"{name} begins at timestep 999.* use dpm, or") as no:
        make_sampler(name, DDIMScheduler(**config), 4)
    assert len(str(no.value)) <= 400
    assert ends(make_sampler("dpm", DDIMScheduler(**config), 4)).isfinite().all()
    for fine in ({"prediction_type": "v_prediction"}, {"timestep_spacing": "leading"}):
        sampler = make_sampler(name, DDIMScheduler(clip_sample=False, **config | fine), 4)
        assert ends(sampler).isfinite().all()


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


@pytest.mark.parametrize("name", BETAS)
def test_defaults_of_the_process_are_kept(name):
    """Heun's are Stable Diffusion's betas, CogVideoX's too; other classes default to DiT's."""
    heun = HeunDiscreteScheduler()
    sampler = make_sampler(name, heun, 10)
    torch.testing.assert_close(sampler.alphas_cumprod, heun.alphas_cumprod)
    video = CogVideoXDDIMScheduler(snr_shift_scale=1.0)
    products = make_sampler(name, video, 10).alphas_cumprod
    torch.testing.assert_close(
        products.double(), video.alphas_cumprod.double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("em", DDIMScheduler()),
        ("em", FlowMatchEulerDiscreteScheduler()),
        ("flow", DDIMScheduler()),
        ("flow", VPSDEEulerMaruyamaScheduler()),
        *((name, FlowMatchEulerDiscreteScheduler(shift=3.0)) for name in BETAS),
        ("dpm", EDMEulerScheduler()),
        ("ddim", SCMScheduler()),
        ("ddim", CogVideoXDDIMScheduler()),  # its signal is scaled behind the betas
        ("ddim", UniPCMultistepScheduler(use_flow_sigmas=True)),
        ("dpm-fast", DDIMScheduler(rescale_betas_zero_snr=True)),  # has no such option
    ],
)
def test_a_sampler_of_another_process_is_refused(name, other):
    about = f"^the sampler {name} does not follow the process of {type(other).__name__} "
    with pytest.raises(AccelkitError, match=about):
        make_sampler(name, other, 10)


@pytest.mark.parametrize(
    ("name", "other", "advice"),
    [
        ("em", DDIMScheduler(), "ddim does, or sample with the pipeline itself"),
        (
            "ddim",
            FlowMatchEulerDiscreteScheduler(),
            "flow does, or sample with the pipeline itself",
        ),
        ("dpm", EDMEulerScheduler(), "(EDM); sample with the pipeline itself"),
        ("ddim", SCMScheduler(), "(trigonometric flow); sample with the pipeline itself"),
        ("ddim", CogVideoXDDIMScheduler(), "betas); sample with the pipeline itself"),
    ],
)
def test_advice_is_what_can_be_done(name, other, advice):
    with pytest.raises(AccelkitError) as no:
        make_sampler(name, other, 10)
    assert str(no.value).endswith(advice)
    if " does" in advice:
        assert make_sampler(advice.split()[0], other, 10)


@pytest.mark.parametrize(
    "other",
    [EDMEulerScheduler(), SCMScheduler(), CogVideoXDDIMScheduler(), diffusers.MiniMaxH3Scheduler()],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_no_sampler_of_a_process_is_advised_where_there_is_none(other):
    kind = NoiseAxis.of(other).kind
    expected = (
        f"no sampler follows the process of {type(other).__name__} ({kind}); "
        "sample with the pipeline itself"
    )
    for ask in (
        lambda: make_sampler("auto", other, 10),
        lambda: sampler_for(Subject(None, None, other), "auto", 10),
    ):
        with pytest.raises(AccelkitError) as no:
            ask()
        assert str(no.value) == expected


@pytest.mark.parametrize(
    "other",
    [
        DDPMScheduler(beta_schedule="sigmoid", clip_sample=False),
        DDPMScheduler(beta_schedule="laplace", clip_sample=False),
        HeunDiscreteScheduler(beta_schedule="exp"),
    ],
    ids=lambda scheduler: scheduler.config.beta_schedule,
)
@pytest.mark.parametrize("name", BETAS)
def test_betas_that_a_sampler_has_no_name_for(name, other):
    sampler = make_sampler(name, other, 10)
    torch.testing.assert_close(sampler.alphas_cumprod, other.alphas_cumprod)
    assert ends(sampler).isfinite().all()


def test_flow_takes_the_steps_of_the_pipelines_scheduler():
    pipelines = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = make_sampler("flow", pipelines, 8)
    pipelines.set_timesteps(8)
    assert torch.equal(sampler.timesteps, pipelines.timesteps)
    assert torch.equal(sampler.sigmas, pipelines.sigmas)
    # how a resolution shifts them only its pipeline knows
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert len(make_sampler("flow", dynamic, 8).timesteps) == 8


def test_flow_sigmas_of_a_vp_solver_are_kept():
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    sampler = make_sampler("dpm", UniPCMultistepScheduler(**config), 8)
    assert sampler.config.use_flow_sigmas
    assert sampler.config.prediction_type == "flow_prediction"
    assert sampler.config.flow_shift == 3


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm"])
def test_the_continuous_process_at_whole_timesteps(name):
    sde = VPSDEEulerMaruyamaScheduler()
    sampler = make_sampler(name, sde, 50)
    t = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(sampler.alphas_cumprod, np.exp(-0.1 * t - 9.95 * t**2), rtol=2e-3)
    assert sampler.timesteps[0] == 999  # pure noise
    assert ends(sampler).isfinite().all()


@pytest.mark.parametrize("of", [VPSDEEulerMaruyamaScheduler, VPSDEDPMSolverScheduler])
def test_solvers_of_the_continuous_process(of):
    sde = of(beta_max=12.0)
    for name, kind in [("em", VPSDEEulerMaruyamaScheduler), ("dpm-fast", VPSDEDPMSolverScheduler)]:
        sampler = make_sampler(name, sde, 10)
        assert type(sampler) is kind
        assert sampler is not sde
        assert sampler.config.beta_max == 12
        assert ends(sampler).isfinite().all()
    assert sde.num_inference_steps is None


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_draws_noise_takes_a_generator(name):
    def run(seed):
        sampler = make_sampler(name, original(name), 3)
        x = torch.ones(1, 4, 2, 2)
        for t in sampler.timesteps:
            rng = {"generator": torch.Generator().manual_seed(seed)} if name in STOCHASTIC else {}
            x = sampler.step(0.1 * x, t, x, **rng).prev_sample
        return x

    assert torch.equal(run(0), run(1)) == (name not in STOCHASTIC)
    assert torch.equal(run(0), run(0))


def test_a_solvers_shift_of_flow_matching_is_kept():
    """Under another name."""
    solver = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    sampler = make_sampler("auto", solver, 4)
    own = FlowMatchEulerDiscreteScheduler(shift=5.0)
    own.set_timesteps(4)
    assert torch.equal(sampler.timesteps, own.timesteps)


def test_an_object_without_a_network_is_read_for_its_scheduler():
    scheduler = DDIMScheduler(steps_offset=1)
    made = sampler_for(SimpleNamespace(scheduler=scheduler), "ddim", 4)
    scheduler.set_timesteps(4)
    assert torch.equal(made.timesteps, scheduler.timesteps)
