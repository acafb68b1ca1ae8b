"""Timesteps and images of accelkit's samplers are those of diffusers' own pipelines with them."""

import functools

import diffusers
import pytest
import text_pipes
import torch
from test_generate import build as dit

from accelkit.backbones import flux, sana, wan
from accelkit.backbones.watched import learn
from accelkit.errors import AccelkitError
from accelkit.models import UViTPipeline, UViTTransformer2DModel
from accelkit.noise.vp_sde import VPSDEDPMSolverScheduler, VPSDEEulerMaruyamaScheduler
from accelkit.sample import sampler_for
from accelkit.sample.generate import Sampling, generate_latents

SEEDS = [5, 6]
SMALL = {"height": 16, "width": 16}
LARGE = {"height": 64, "width": 64}
OPTIONS = {
    "pixart": {"use_resolution_binning": False, **SMALL},
    "sd3": SMALL,
    "flux": SMALL,
    "hunyuan": {"use_resolution_binning": False, **LARGE}
    | {"original_size": (64, 64), "target_size": (64, 64)},
    "sana": {"use_resolution_binning": False, "height": 32, "width": 32},
    "sd": SMALL,
    "sdxl": LARGE,
    "wan": {"num_frames": 1, **LARGE},
    "auraflow": SMALL,
    "lumina2": {"cfg_normalization": False, **LARGE},
}
SHAPES = {
    flux._FluxCaptions: (4, 8, 8),
    wan._WanCaptions: (4, 8, 8),
    sana._SanaCaptions: (4, 16, 16),
}
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
    "dpm-fast": diffusers.DPMSolverSinglestepScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
}
GIVEN = {
    "ddim": {"clip_sample": False},
    "ddpm": {"clip_sample": False},
    "dpm-fast": {"solver_order": 3, "lower_order_final": True},
}


@functools.cache
def text_pipe(family):
    pipe = text_pipes.make(family)
    learn(pipe)
    return pipe, pipe.scheduler


@pytest.fixture
def made(monkeypatch):
    """Pipelines of small images, each with the scheduler that it is saved with."""
    for kind, shape in SHAPES.items():
        monkeypatch.setattr(kind, "shape", shape)

    def make(family):
        pipe, pipe.scheduler = text_pipe(family)
        return pipe

    return make


def run(pipe, scheduler, **options):
    """What a pipeline makes with a scheduler, and the timesteps that it visits."""
    own, pipe.scheduler, visited = pipe.scheduler, scheduler, []
    step = scheduler.step

    @functools.wraps(step)  # pipelines look its arguments up
    def watched(output, t, *rest, **options):
        visited.append(float(t))
        return step(output, t, *rest, **options)

    scheduler.step = watched
    options["generator"] = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    made = pipe(**options, output_type="latent")[0]
    pipe.scheduler = own
    return made, visited


def same(pipe, family, name, scheduler, steps):
    items, guidance = ["a red bird"] * len(SEEDS), 1.0 if family == "flux" else 2.0
    options = OPTIONS[family] | {"prompt": items, "num_inference_steps": steps}
    if family != "flux":  # its scale is no second pass
        options["guidance_scale"] = guidance
    expected, visited = run(pipe, scheduler, **options)
    if family == "flux":
        expected = pipe._unpack_latents(expected, 16, 16, pipe.vae_scale_factor)
    assert sampler_for(pipe, name, steps).timesteps.tolist() == pytest.approx(visited)
    found = generate_latents(pipe, items, SEEDS, Sampling(name, steps, guidance))
    close(found, expected.reshape(found.shape))


def close(found, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm", "dpm-fast"])
@pytest.mark.parametrize("family", ["pixart", "hunyuan", "sd", "sdxl"])
def test_diffusion(family, name, steps, made):
    if family == "pixart" and name.startswith("dpm"):
        steps = max(steps, 2)  # whose one step is that of a distilled model
    pipe = made(family)
    scheduler = CLASSES[name].from_config(pipe.scheduler.config, **GIVEN.get(name, {}))
    if name == "ddpm":  # which fixes the variance, as these pipelines do
        pipe.scheduler = CLASSES[name].from_config(scheduler.config)
    same(pipe, family, name, scheduler, steps)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ddim", {"prediction_type": "v_prediction", "set_alpha_to_one": False}),
        ("ddim", {"clip_sample": True, "clip_sample_range": 0.5}),
        ("ddim", {"thresholding": True, "sample_max_value": 1.5, "prediction_type": "sample"}),
        (
            "ddim",
            {
                "rescale_betas_zero_snr": True,
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
            },
        ),
        ("ddpm", {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
        ("ddpm", {"variance_type": "fixed_small_log", "timestep_spacing": "trailing"}),
        ("dpm", {"timestep_spacing": "trailing", "steps_offset": 1}),
        ("dpm", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("dpm", {"use_karras_sigmas": True}),
        ("dpm", {"use_exponential_sigmas": True}),
        ("dpm", {"use_lu_lambdas": True, "solver_type": "heun"}),
        ("dpm", {"final_sigmas_type": "sigma_min", "solver_order": 3}),
        ("dpm", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
        ("dpm", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        ("dpm-fast", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    ],
)
def test_settings_of_a_scheduler(name, config, made):
    """All of them are the pipeline's, as it has them saved."""
    pipe, given = made("sd"), GIVEN.get(name, {}) | config
    pipe.scheduler = CLASSES[name].from_config(pipe.scheduler.config, **given)
    same(pipe, "sd", name, CLASSES[name].from_config(pipe.scheduler.config), 5)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("family", ["sd3", "flux", "sana", "wan", "auraflow", "lumina2"])
def test_flow_matching(family, steps, made):
    pipe = made(family)
    shift = pipe.scheduler.config.get("flow_shift", 3.0)
    same(pipe, family, "flow", CLASSES["flow"](shift=shift), steps)


@pytest.mark.parametrize("family", ["sd3", "flux", "lumina2"])
@pytest.mark.parametrize(
    "config",
    [
        {"max_shift": 3.0, "base_image_seq_len": 4},
        {"time_shift_type": "linear", "base_shift": 2.0},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
    ],
)
def test_a_shift_by_resolution(family, config, made):
    pipe = made(family)
    pipe.scheduler = CLASSES["flow"](use_dynamic_shifting=True, **config)
    same(pipe, family, "flow", CLASSES["flow"].from_config(pipe.scheduler.config), 5)


@pytest.mark.parametrize("family", ["sana", "wan", "auraflow"])
def test_a_shift_that_the_pipeline_does_not_know_is_refused(family, made):
    """Their own calls end in a ValueError: "`mu` must be passed"."""
    pipe = made(family)
    pipe.scheduler = CLASSES["flow"](use_dynamic_shifting=True)
    with pytest.raises(AccelkitError, match="does not say by how much; give it a scheduler"):
        sampler_for(pipe, "flow", 5)


def test_a_shift_that_was_set_since(made):
    pipe, scheduler = made("sd3"), CLASSES["flow"]()
    pipe.scheduler = CLASSES["flow"]()
    for each in (pipe.scheduler, scheduler):
        each.set_shift(5.0)
    same(pipe, "sd3", "flow", scheduler, 4)


@pytest.mark.parametrize("name", ["dpm", "dpm-fast"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_solver_of_flow_matching(name, dynamic, made):
    family = "sd3" if dynamic else "wan"
    pipe = made(family)
    config = made("wan").scheduler.config | {"use_dynamic_shifting": dynamic}
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(config)
    scheduler = CLASSES[name].from_config(pipe.scheduler.config, **GIVEN.get(name, {}))
    same(pipe, family, name, scheduler, 6)


def test_timesteps_that_are_rounded_alike(made):
    """The first two of them as well, by whose value a scheduler looks for its place."""
    pipe = made("wan")
    pipe.scheduler = CLASSES["dpm"].from_config(pipe.scheduler.config, flow_shift=1000.0)
    first, second = sampler_for(pipe, "dpm", 10).timesteps[:2]
    assert first == second
    same(pipe, "wan", "dpm", CLASSES["dpm"].from_config(pipe.scheduler.config), 10)


@pytest.mark.parametrize("shift", [{}, {"use_dynamic_shifting": True}])
def test_flux_at_its_own_size(shift, monkeypatch):
    pipe, _ = text_pipe("flux")
    pipe.scheduler = CLASSES["flow"](**shift)
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda hidden_states, **rest: (0 * hidden_states,)
    )
    side = {"height": 256, "width": 256}  # of latents, twice that
    scheduler = CLASSES["flow"](**shift)
    _, visited = run(pipe, scheduler, prompt=["a"] * 2, num_inference_steps=4, **side)
    assert sampler_for(pipe, "auto", 4).timesteps.tolist() == pytest.approx(visited)


def test_watching_leaves_a_pipeline_as_it_was():
    pipe, pipe.scheduler = text_pipe("lumina2")
    before, drawn = dict(vars(pipe.scheduler)), torch.random.get_rng_state()
    sampler_for(pipe, "flow", 3)
    assert vars(pipe.scheduler) == before
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert "forward" not in vars(pipe.transformer)


def test_a_pipeline_that_does_not_come_to_its_timesteps(monkeypatch):
    pipe, pipe.scheduler = text_pipe("lumina2")
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(AccelkitError, match="cannot find the timesteps of Lumina2Pipeline") as no:
        sampler_for(pipe, "flow", 3)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm"])
@pytest.mark.parametrize("steps", [1, 6])
def test_dit(name, steps):
    pipe = dit(CLASSES[name](**GIVEN.get(name, {})))
    options = {"class_labels": [3, 7], "guidance_scale": 1.0, "num_inference_steps": steps}
    kept, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda latents: kept.append(latents) or decode(latents)
    scheduler = CLASSES[name].from_config(pipe.scheduler.config)
    generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    pipe.scheduler, own = scheduler, pipe.scheduler
    if name == "ddpm":  # it gives its scheduler no generators

        def noise(shape, **_):
            return torch.cat([torch.randn(1, *shape[1:], generator=g) for g in generator])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", noise)
            pipe(**options, generator=generator, output_type="np")
    else:
        pipe(**options, generator=generator, output_type="np")
    pipe.scheduler = own
    found = generate_latents(pipe, [3, 7], SEEDS, Sampling(name, steps))
    close(found, kept[0] * pipe.vae.config.scaling_factor)
    assert sampler_for(pipe, name, steps).timesteps.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("ddim", CLASSES["ddim"](clip_sample=False)),
        ("ddpm", CLASSES["ddpm"](clip_sample=False, timestep_spacing="trailing")),
        ("dpm", CLASSES["dpm"]()),
        ("em", VPSDEEulerMaruyamaScheduler()),
        ("dpm-fast", VPSDEDPMSolverScheduler(beta_max=12.0)),
    ],
)
@pytest.mark.parametrize("steps", [2, 7])
def test_u_vit(name, scheduler, steps):
    torch.manual_seed(0)
    network = UViTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=4, num_attention_heads=2, attention_head_dim=8
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = UViTPipeline(network.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    again = type(scheduler).from_config(scheduler.config)
    expected, visited = run(pipe, again, batch_size=2, num_inference_steps=steps)
    assert sampler_for(pipe, name, steps).timesteps.tolist() == pytest.approx(visited)
    close(generate_latents(pipe, [None] * 2, SEEDS, Sampling(name, steps)), expected)
