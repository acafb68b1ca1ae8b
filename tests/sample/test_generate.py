"""Images from labels and seeds: against diffusers' pipeline, float64 and each image alone."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
)
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

from accelkit.errors import AccelkitError
from accelkit.runtime.switch import disable, enable
from accelkit.sample.generate import Sampling, generate, generate_latents, grid, guide

LABELS, SEEDS = [3, 7, 999, 3], [11, 12, 13, 14]
DDIM = DDIMScheduler(clip_sample=False)
ALL = ["ddpm", "ddim", "dpm"]


def build(scheduler=DDIM, learned=True, classes=1000):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8 if learned else 4,
            num_layers=5,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=classes,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.3,
        )
    pipe = DiTPipeline(model.eval(), vae.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return build()


class Recorder:
    """The calls of a pipeline's denoiser and autoencoder."""

    def __init__(self, pipe):
        self.calls, self.decoded = [], []
        self._hooks = [pipe.transformer.register_forward_hook(self._call, with_kwargs=True)]
        self._vae = pipe.vae
        pipe.vae.decode = self._decode

    def _call(self, module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        self.calls.append((x, kwargs["timestep"], kwargs["class_labels"], output[0]))

    def _decode(self, latents, *args, **kwargs):
        self.decoded.append(latents)
        return AutoencoderKL.decode(self._vae, latents, *args, **kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        del self._vae.decode
        for hook in self._hooks:
            hook.remove()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("schedule", [None, "5@0.3,3@0.7,1@1"])
def test_ddim_is_what_diffusers_pipeline_does(pipe, guidance, schedule):
    how = Sampling("ddim", 7, guidance)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    if schedule:
        enable(pipe, schedule)
    try:
        with Recorder(pipe) as theirs:
            expected = pipe(
                LABELS,
                guidance_scale=guidance,
                generator=generators,
                num_inference_steps=7,
                output_type="np",
            ).images
        with Recorder(pipe) as ours:
            images = generate(pipe, LABELS, SEEDS, how)
    finally:
        if schedule:
            disable(pipe)
    assert images.shape == (4, 8, 8, 3)
    assert images.dtype == np.uint8
    assert np.abs(images - (expected * 255).round()).max() <= 1
    torch.testing.assert_close(ours.decoded[0], theirs.decoded[0], rtol=1e-4, atol=1e-4)
    assert len(ours.calls) == len(theirs.calls) == 7


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 4), (1.5, 8), (0.0, 8)])
def test_only_guidance_costs_a_second_half(pipe, guidance, rows):
    with Recorder(pipe) as record:
        generate_latents(pipe, LABELS, SEEDS, Sampling("ddim", 3, guidance))
    assert {len(x) for x, *_ in record.calls} == {rows}
    assert {tuple(labels.tolist()) for _, _, labels, _ in record.calls} == {
        (*LABELS, *[1000] * (rows - 4))
    }


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_its_batch(pipe, sampler, guidance):
    how = Sampling(sampler, 6, guidance)
    batch = generate_latents(pipe, LABELS, SEEDS, how)
    reversed_ = generate_latents(pipe, LABELS[::-1], SEEDS[::-1], how)
    alone = torch.cat(
        [
            generate_latents(pipe, [label], [seed], how)
            for label, seed in zip(LABELS, SEEDS, strict=True)
        ]
    )
    scale = batch.abs().max().item()
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(batch, reversed_.flip(0), rtol=0, atol=1e-5 * scale)
    assert (batch[0] - batch[3]).abs().max() > 0.01 * scale  # same label, other seed


@pytest.mark.parametrize("sampler", ALL)
def test_global_random_state_plays_no_part(pipe, sampler):
    how = Sampling(sampler, 4)
    torch.manual_seed(1)
    one = generate_latents(pipe, LABELS, SEEDS, how)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    other = generate_latents(pipe, LABELS, SEEDS, how)
    assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ancestral_sampling_uses_the_learned_variance(pipe, guidance):
    """Every step against float64, from Bayes' rule on the shortened chain."""
    steps, channels = 5, 3
    how = Sampling("ddpm", steps, guidance, channels)
    with Recorder(pipe) as record:
        final = generate_latents(pipe, LABELS, SEEDS, how)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]

    def noise():
        return torch.cat([torch.randn(1, 4, 4, 4, generator=g) for g in generators]).double()

    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    indices = [800, 600, 400, 200, 0]
    torch.testing.assert_close(record.calls[0][0][:4].double(), noise())
    inputs = [x[:4].double() for x, *_ in record.calls] + [final.double()]
    for i, (_, timesteps, _, output) in enumerate(record.calls):
        assert set(timesteps.tolist()) == {indices[i]}
        output = output.double()
        eps, v = output[:4, :4].clone(), output[:4, 4:]
        if guidance != 1:
            other = output[4:, :channels]
            eps[:, :channels] = other + guidance * (eps[:, :channels] - other)
        here = abar[indices[i]]
        before = abar[indices[i + 1]] if i + 1 < steps else torch.ones((), dtype=torch.float64)
        alpha = here / before
        beta = 1 - alpha
        x0 = (inputs[i] - (1 - here).sqrt() * eps) / here.sqrt()
        if i + 1 == steps:
            expected = x0
        else:
            precision = 1 / (1 - before) + alpha / beta
            mean = before.sqrt() * x0 / (1 - before) + alpha.sqrt() * inputs[i] / beta
            log_low, log_high = -precision.log(), beta.log()
            deviation = ((log_low + (v + 1) / 2 * (log_high - log_low)) / 2).exp()
            expected = mean / precision + deviation * noise()
        scale = expected.abs().max().item()
        torch.testing.assert_close(inputs[i + 1], expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("sampler", ALL)
def test_without_a_learned_variance(sampler):
    pipe = build(learned=False)
    latents = generate_latents(pipe, LABELS, SEEDS, Sampling(sampler, 4, 2.0))
    assert latents.shape == (4, 4, 4, 4)
    assert latents.isfinite().all()


@pytest.mark.parametrize("sampler", ALL)
@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(clip_sample=False, variance_type="learned_range"),
        DDPMScheduler(clip_sample=False, variance_type="learned"),
        DPMSolverMultistepScheduler(),
        DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ],
    ids=["learned-range", "learned", "dpm", "sde-dpm"],
)
def test_pipelines_with_another_scheduler(sampler, scheduler):
    """The process is the same linear betas, so are the images."""
    how = Sampling(sampler, 5, 2.0)
    latents = generate_latents(build(scheduler), LABELS, SEEDS, how)
    torch.testing.assert_close(latents, generate_latents(build(), LABELS, SEEDS, how))


def test_pipeline_is_left_as_it_was(pipe):
    scheduler, before = pipe.scheduler, dict(pipe.scheduler.config)
    generate(pipe, LABELS, SEEDS)
    assert pipe.scheduler is scheduler
    assert dict(scheduler.config) == before
    assert all(parameter.grad is None for parameter in pipe.transformer.parameters())


def test_half_precision_follows_the_models_dtype():
    pipe = build()
    pipe.transformer.to(torch.bfloat16)
    latents = generate_latents(pipe, [1], [2], Sampling("ddim", 2))
    assert latents.dtype == torch.bfloat16


def test_fewer_classes():
    """The null class is the model's own, not always 1000."""
    pipe = build(classes=10)
    with Recorder(pipe) as record:
        generate_latents(pipe, [9], [0], Sampling("ddim", 1, 2.0))
    assert record.calls[0][2].tolist() == [9, 10]


@pytest.mark.parametrize("labels", [[-1, 0], [0, 11], [0, 1000]])
def test_labels_the_model_lacks(labels):
    with pytest.raises(AccelkitError, match=r"classes 0 to 9, got (-1|11|1000)$"):
        generate(build(classes=10), labels, [0, 1])


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_a_seed_for_every_label(pipe, seeds):
    with pytest.raises(AccelkitError, match=f"2 labels for {len(seeds)} seeds"):
        generate(pipe, [0, 1], seeds)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (Sampling("euler"), "unknown sampler 'euler'"),
        (Sampling("ddim", 0), "0 sampling steps"),
        (Sampling("ddpm", 1001), "1001 sampling steps"),
    ],
)
def test_sampling_that_cannot_be_done(pipe, how, message):
    with pytest.raises(AccelkitError, match=message):
        generate(pipe, [0], [0], how)


class TestGuide:
    cond, uncond = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))

    def test_all_channels(self):
        guided = guide(self.cond, self.uncond, 3.0)
        torch.testing.assert_close(guided, 3 * self.cond - 2 * self.uncond)

    def test_first_channels_only(self):
        """As the original DiT: the rest is the conditional prediction."""
        guided = guide(self.cond, self.uncond, 3.0, 3)
        torch.testing.assert_close(guided[:, :3], 3 * self.cond[:, :3] - 2 * self.uncond[:, :3])
        assert torch.equal(guided[:, 3:], self.cond[:, 3:])

    @pytest.mark.parametrize("channels", [None, 3])
    def test_scales_one_and_zero(self, channels):
        torch.testing.assert_close(guide(self.cond, self.uncond, 1.0, channels), self.cond)
        torch.testing.assert_close(
            guide(self.cond, self.uncond, 0.0, channels)[:, :3], self.uncond[:, :3]
        )

    def test_is_used(self, pipe):
        hows = [Sampling("dpm", 1, 3.0, channels) for channels in (3, None)]  # one step, at t = 999
        some, all_ = (generate_latents(pipe, [1], [2], how) for how in hows)
        torch.testing.assert_close(some[:, :3], all_[:, :3])
        assert (some[:, 3] - all_[:, 3]).abs().max() > 1


def test_a_cache_on_the_model_begins_anew_with_every_batch():
    pipe, how = build(), Sampling("ddim", 6)
    first = generate_latents(pipe, LABELS, SEEDS, how)
    generate_latents(pipe, LABELS, SEEDS, how)
    assert not any("_diffusers_hook" in module.__dict__ for module in pipe.transformer.modules())

    ran = []
    last = pipe.transformer.transformer_blocks[-1].attn1.to_q
    last.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=1e6))
    kept = generate_latents(pipe, LABELS, SEEDS, how)
    assert ran == [4]  # at the first step alone
    assert torch.equal(generate_latents(pipe, LABELS, SEEDS, how), kept)
    generate_latents(pipe, LABELS[:1], SEEDS[:1], how)  # as large a batch as any
    assert ran == [4, 4, 1]
    assert not torch.equal(kept, first)


class TestGrid:
    @staticmethod
    def images(count, height=4, width=5):
        return (
            np.arange(100, 100 + count)
            .astype(np.uint8)[:, None, None, None]
            .repeat(height, 1)
            .repeat(width, 2)
            .repeat(3, 3)
        )

    @pytest.mark.parametrize(
        ("count", "columns", "rows", "across"),
        [(1, 0, 1, 1), (4, 0, 2, 2), (5, 0, 2, 3), (16, 0, 4, 4), (6, 2, 3, 2), (3, 8, 1, 8)],
    )
    def test_layout(self, count, columns, rows, across):
        picture = grid(self.images(count), columns)
        assert picture.shape == (rows * 6 + 2, across * 7 + 2, 3)
        assert picture.dtype == np.uint8
        for i in range(count):
            top, left = 2 + i // across * 6, 2 + i % across * 7
            assert (picture[top : top + 4, left : left + 5] == 100 + i).all()
        assert (picture == 32).sum() == picture.size - count * 4 * 5 * 3
