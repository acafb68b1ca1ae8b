"""UViTPipeline: the sampling loop written out by hand, on disk and back, and with a schedule."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)

import accelkit
from accelkit.errors import AccelkitError
from accelkit.models import UViTPipeline, UViTTransformer2DModel
from accelkit.schedule import Schedule


def build(scheduler=None, vae=False, **changes):
    torch.manual_seed(0)
    model = UViTTransformer2DModel(
        **{
            "sample_size": 8,
            "in_channels": 4 if vae else 3,
            "num_layers": 12,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            **changes,
        }
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    autoencoder = (
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        if vae
        else None
    )
    pipe = UViTPipeline(model, scheduler or DDIMScheduler(clip_sample=False), autoencoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def test_unconditional_pixels_by_hand():
    pipe = build(timestep_scale=0.999, timestep_offset=0.999)
    made = pipe(
        batch_size=2, num_inference_steps=4, generator=seeded(1)[0], output_type="latent"
    ).images
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 8, 8, generator=seeded(1)[0])
    for t in (750, 500, 250, 0):
        eps = pipe.transformer(x, 999 * (t + 1) / 1000).sample
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(made, x)


@torch.no_grad()
def test_guidance_is_the_papers_with_one_added():
    pipe = build(num_classes=5, null_class=4, timestep_offset=1.0)
    made = pipe(
        [0, 3],
        guidance_scale=1.4,
        num_inference_steps=2,
        generator=seeded(1)[0],
        output_type="latent",
    ).images
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(2)
    x = torch.randn(2, 3, 8, 8, generator=seeded(1)[0])
    for t in (500, 0):
        cond = pipe.transformer(x, t + 1, torch.tensor([0, 3])).sample
        uncond = pipe.transformer(x, t + 1, torch.tensor([4, 4])).sample
        x = scheduler.step(cond + 0.4 * (cond - uncond), t, x).prev_sample
    torch.testing.assert_close(made, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_an_image_depends_on_its_own_generator_only(kind):
    pipe = build(kind(), num_classes=5)
    both = pipe([1, 2], generator=seeded(7, 8), num_inference_steps=3, output_type="np").images
    for label, seed, image in zip((1, 2), (7, 8), both, strict=True):
        alone = pipe([label], generator=seeded(seed), num_inference_steps=3, output_type="np")
        np.testing.assert_allclose(alone.images[0], image, atol=1e-5)


@torch.no_grad()
def test_other_samplers_scale_noise_and_input_themselves():
    pipe = build(EulerDiscreteScheduler())
    made = pipe(generator=seeded(1), num_inference_steps=3, output_type="latent").images
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    x = torch.randn(1, 3, 8, 8, generator=seeded(1)[0]) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        eps = pipe.transformer(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(made, x)
    assert scheduler.init_noise_sigma > 10


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        EDMEulerScheduler(),
        SCMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_scheduler_of_another_process_is_refused(scheduler):
    """Most of which have the interface of those that a U-ViT samples with."""
    named = f"a U-ViT predicts the noise, which {type(scheduler).__name__} does not sample with"
    with pytest.raises(AccelkitError, match=named):
        build(scheduler)(num_inference_steps=2)


def test_timesteps_that_are_rounded_alike_are_all_visited():
    """The first two as well, by whose value a scheduler looks for its place."""
    pipe = build(DPMSolverMultistepScheduler(use_exponential_sigmas=True, num_train_timesteps=20))
    made = pipe(num_inference_steps=100, output_type="latent").images
    first, second = pipe.scheduler.timesteps[:2]
    assert first == second
    assert pipe.scheduler.step_index == 100
    assert made.isfinite().all()


def test_latents_are_decoded_at_the_autoencoders_scale():
    pipe = build(vae=True, num_classes=5)
    run = {"generator": seeded(1)[0], "num_inference_steps": 2}
    latents = pipe([0, 1], output_type="latent", **run).images
    images = pipe([0, 1], output_type="pt", **run | {"generator": seeded(1)[0]}).images
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1))
    assert images.shape == (2, 3, 8, 8)


def test_kinds_of_output():
    pipe = build()
    outputs = {
        kind: pipe(
            batch_size=2, generator=seeded(1)[0], num_inference_steps=2, output_type=kind
        ).images
        for kind in ("pil", "np", "pt")
    }
    assert outputs["np"].shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(outputs["pt"].permute(0, 2, 3, 1).numpy(), outputs["np"])
    for image, array in zip(outputs["pil"], outputs["np"], strict=True):
        np.testing.assert_array_equal(np.asarray(image), (array * 255).round().astype(np.uint8))
    held = pipe(num_inference_steps=1, return_dict=False)
    assert type(held) is tuple
    assert len(held[0]) == 1  # one image if nothing says how many


@pytest.mark.parametrize("vae", [False, True])
def test_saved_and_loaded_it_samples_the_same(tmp_path, vae):
    pipe = build(vae=vae, num_classes=5, timestep_scale=0.999, timestep_offset=0.999)
    pipe.save_pretrained(tmp_path)
    loaded = UViTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.vae is None) is not vae
    assert type(loaded.transformer) is UViTTransformer2DModel
    run = {"num_inference_steps": 2, "output_type": "np"}
    first, second = (p([1, 2], generator=seeded(3)[0], **run).images for p in (pipe, loaded))
    np.testing.assert_array_equal(first, second)


def test_a_schedule_runs_on_it_at_the_schedulers_noise_level():
    pipe = build(timestep_scale=0.999, timestep_offset=0.999)
    ran = []
    for block in pipe.transformer.out_blocks:
        block.attn.register_forward_hook(lambda *_: ran.append(1))
    state = accelkit.enable(pipe, "D3")
    schedule = Schedule.parse("D3", 6, "uvit")
    assert state.schedule == schedule
    expected = []
    for t in (980, 960, 800, 780, 600, 400, 200, 180, 0):
        ran.clear()
        told = pipe.transformer.timestep_of(torch.tensor([t]))
        with torch.no_grad():
            pipe.transformer(torch.zeros(1, 3, 8, 8), told)
        expected.append(len(ran))
    assert expected == [1, 1, 1, 2, 2, 3, 4, 6, 6]
    assert len(pipe(num_inference_steps=5).images) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"class_labels": [0, 5]}, "classes 0 to 4, got 5"),
        ({}, "has 5 classes; give class_labels"),
        ({"class_labels": []}, r"a class for each image, such as \[0, 1\], got \[\]"),
        ({"class_labels": 3}, "a class for each image, .* got 3"),
        ({"class_labels": [0], "batch_size": 0}, "a batch_size of at least 1, got 0"),
        ({"class_labels": [0], "guidance_scale": 2.0}, "leave guidance_scale at 1"),
        ({"class_labels": [0], "output_type": "jpg"}, "output_type='jpg'; give pil, np, pt"),
        ({"class_labels": [0, 1], "generator": seeded(1)}, "1 generators for 2 images"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(AccelkitError, match=message):
        build(num_classes=5)(**given)


def test_labels_without_classes_are_refused():
    with pytest.raises(AccelkitError, match="no classes; give batch_size"):
        build()([0])


def test_the_call_reads_like_diffusers_own():
    from diffusers import DiTPipeline

    own, theirs = (inspect.signature(c.__call__).parameters for c in (UViTPipeline, DiTPipeline))
    assert set(theirs) <= set(own)
