"""Pictures to latents and back: what diffusers' own pipelines make of the same latents."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import text_pipes
import torch
from diffusers.models import autoencoders as theirs_all
from PIL import Image
from safetensors.torch import load_file
from small_dit import inputs
from typer.testing import CliRunner

from accelkit.backbones import backbone_of, denoiser_of
from accelkit.backbones.autoencoders import (
    KINDS,
    autoencoder_of,
    channels_of,
    decoded,
    factor_of,
    posterior,
    scaling,
)
from accelkit.backbones.conditioning import conditioning_of
from accelkit.backbones.watched import learn
from accelkit.cli import app
from accelkit.data.latents import encode_latents
from accelkit.data.sources import open_source
from accelkit.errors import AccelkitError
from accelkit.models import UViTPipeline, UViTTransformer2DModel
from accelkit.sample.generate import Sampling, decode, generate

OPTIONS = {
    "pixart": {"height": 16, "width": 16, "use_resolution_binning": False},
    "sd3": {"height": 16, "width": 16},
    "flux": {"height": 16, "width": 16},
    "hunyuan": {"height": 64, "width": 64, "use_resolution_binning": False},
    "sana": {"height": 32, "width": 32, "use_resolution_binning": False},
    "sd": {"height": 16, "width": 16},
    "sdxl": {"height": 64, "width": 64},
    "wan": {"height": 64, "width": 64, "num_frames": 1},
    "auraflow": {"height": 16, "width": 16},
    "lumina2": {"height": 16, "width": 16},
}
EVERY_SETTING = {
    "scaling_factor": 0.5,
    "shift_factor": 0.4,
    "latents_mean": [-1.66, 1.89, -1.38, 2.52],
    "latents_std": [8.49, 5.90, 6.55, 5.23],
}
LEVELS = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "latent_channels": 4,
}


def kl(**options):
    return diffusers.AutoencoderKL(**{**LEVELS, **options})


def without_quantisation():
    return kl(use_quant_conv=False, use_post_quant_conv=False)


def asymmetric():
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=LEVELS["down_block_types"],
        down_block_out_channels=(8, 8, 8),
        up_block_types=LEVELS["up_block_types"],
        up_block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
    )


def tiny():
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=0.7,
    )


def quantised():
    # another number of channels before its codebook than in it
    return diffusers.VQModel(
        **{**LEVELS, "latent_channels": 3}, vq_embed_dim=4, num_vq_embeddings=64
    )


def compressing():
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((),) * 3,
        decoder_qkv_multiscales=((),) * 3,
        encoder_layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )


def hunyuan_image():
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=16,
        scaling_factor=0.6,
    )


PICTURES = (kl, without_quantisation, asymmetric, tiny, quantised, compressing, hunyuan_image)
"""All but Wan's, which no pipeline of the others can hold."""


def filled(make, std=None, **options):
    """An autoencoder that makes something else of every latent."""
    std = std or (0.1 if make is tiny else 0.2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return text_pipes.filled(make(**options), std)


def dit_pipe(make_dit, vae):
    pipe = diffusers.DiTPipeline(make_dit(2), vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own(pipe, **options):
    """The pipeline's own pictures (B, H, W, 3) in [0, 1], and the latents that they are of."""
    ends, step = [], pipe.scheduler.step

    def recorded(*args, **kwargs):
        made = step(*args, **kwargs)
        ends.append(made[0] if isinstance(made, tuple) else made.prev_sample)
        return made

    pipe.scheduler.step = recorded
    options = {"num_inference_steps": 2, "output_type": "np", **options}
    draw = torch.Generator().manual_seed(0)
    pictures = pipe(generator=draw, return_dict=False, **options)[0]
    del pipe.scheduler.step
    pictures = np.asarray(pictures)
    return pictures.reshape(-1, *pictures.shape[-3:]), ends[-1]


def same_pictures(ours, theirs, off=0):
    assert theirs.std() > 0.02
    assert np.mean((theirs > 0) & (theirs < 1)) > 0.1  # not all of it cut off
    assert ours.dtype == np.uint8
    difference = np.abs(ours.astype(int) - (theirs * 255).round().astype(int))
    assert difference.max() <= 1 + off  # where one rounds up and the other down
    assert (difference > off).mean() < 0.01


# --- every family, with every setting that an autoencoder can have


@pytest.mark.parametrize("family", OPTIONS)
def test_a_family_applies_the_settings_that_its_pipeline_applies(family):
    pipe = text_pipes.make(family)
    if family == "wan":
        pipe.vae.register_to_config(
            latents_mean=EVERY_SETTING["latents_mean"], latents_std=EVERY_SETTING["latents_std"]
        )
    elif family != "sana":
        pipe.vae.register_to_config(**EVERY_SETTING)
    text_pipes.filled(pipe.vae, 0.3)
    if family == "sdxl":  # whose own scheduler does not step to the end
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pictures, latents = own(pipe, prompt="a red bird", **OPTIONS[family])
    if family == "flux":
        latents = pipe._unpack_latents(latents, 16, 16, pipe.vae_scale_factor)
    same_pictures(decode(pipe, latents), pictures)


def test_the_settings_of_a_dit_and_of_ours(make_dit):
    """DiT's pipeline only scales; the U-ViT's, ours, applies all that the autoencoder has."""
    vae = filled(kl, **EVERY_SETTING)
    pictures, latents = own(dit_pipe(make_dit, vae), class_labels=[1, 2], guidance_scale=1.0)
    same_pictures(decode(dit_pipe(make_dit, vae), latents), pictures)

    network = UViTTransformer2DModel(
        sample_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4
    )
    pipe = UViTPipeline(text_pipes.filled(network), diffusers.DDIMScheduler(), vae)
    pipe.set_progress_bar_config(disable=True)
    pictures, latents = own(pipe, batch_size=2)
    same_pictures(decode(pipe, latents), pictures)
    mean, std = (
        torch.tensor(EVERY_SETTING[f"latents_{k}"])[:, None, None] for k in ("mean", "std")
    )
    with torch.no_grad():
        made = vae.decode(latents * std / 0.5 + mean).sample
    expected = (made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(pictures, expected, atol=1e-5)


def ldm(vae):
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = diffusers.LDMPipeline(vae, text_pipes.filled(network), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_autoencoder_under_another_name(tmp_path):
    pipe = ldm(filled(quantised))
    pictures, latents = own(pipe, batch_size=2)
    same_pictures(decode(pipe, latents), pictures)
    assert autoencoder_of(pipe) is pipe.vqvae
    assert conditioning_of(backbone_of(pipe.unet)).pixels(pipe) == pictures.shape[1] == 32
    assert generate(pipe, [None], [0], Sampling("ddim", 2)).shape == (1, 32, 32, 3)


# --- every class of autoencoder


@pytest.mark.parametrize("make", PICTURES)
def test_a_class_decodes_as_in_its_pipeline(make, make_dit):
    pipe = dit_pipe(make_dit, filled(make))
    pictures, latents = own(pipe, class_labels=[1, 2], guidance_scale=1.0)
    same_pictures(decode(pipe, latents), pictures)
    assert pictures.shape[1] == factor_of(pipe.vae) * latents.shape[-1]
    assert channels_of(pipe.vae) == latents.shape[1]
    assert conditioning_of(backbone_of(pipe.transformer)).pixels(pipe) == pictures.shape[1]
    compiled = torch.compile(pipe.vae, backend="eager")
    assert factor_of(compiled) == factor_of(pipe.vae)


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def pixels_of(folder):
    arrays = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    return torch.tensor(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("make", PICTURES)
def test_a_class_encodes_as_in_its_pipeline(make, folder, tmp_path):
    """By the rule of their image-to-image pipelines, and diffusers' own way to the latents."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
        retrieve_latents,
    )

    vae = filled(make)
    latents = encode_latents(open_source(folder), vae, size=16, cache_dir=tmp_path / "cache")
    with torch.no_grad():
        encoded = vae.encode(pixels_of(folder))
    if make is compressing:  # as SanaSprintImg2ImgPipeline does it
        expected = encoded.latent
    else:
        expected = retrieve_latents(encoded, torch.Generator().manual_seed(5))
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    ours = latents.sample(torch.arange(3), noise)
    assert latents.shape == (4, 4, 4)
    torch.testing.assert_close(ours, expected * vae.config.scaling_factor)
    # and back again, as a pipeline does it
    with torch.no_grad():
        torch.testing.assert_close(decoded(vae, ours), vae.decode(expected).sample)


IMAGE_TO_IMAGE = {
    "sd": "StableDiffusionImg2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Img2ImgPipeline",
    "flux": "FluxImg2ImgPipeline",
}


@pytest.mark.parametrize("family", IMAGE_TO_IMAGE)
def test_a_family_encodes_as_its_image_to_image_pipeline(family, folder, tmp_path, monkeypatch):
    pipe = text_pipes.make(family)
    pipe.vae = filled(kl, **EVERY_SETTING)
    other = getattr(diffusers, IMAGE_TO_IMAGE[family])(**pipe.components)
    # noise would be added at once
    monkeypatch.setattr(other.scheduler, "add_noise", lambda sample, *rest: sample, raising=False)
    monkeypatch.setattr(other.scheduler, "scale_noise", lambda x, *rest: x, raising=False)
    draw, pixels = torch.Generator().manual_seed(5), pixels_of(folder)
    if family == "flux":
        expected = other._encode_vae_image(pixels, draw)
    else:
        other.scheduler.set_timesteps(2)
        t = other.scheduler.timesteps[-1:]
        expected = other.prepare_latents(pixels, t, 3, 1, torch.float32, "cpu", draw)
    applied = conditioning_of(backbone_of(denoiser_of(pipe))).latent_settings
    latents = encode_latents(
        open_source(folder), pipe.vae, size=16, cache_dir=tmp_path / "cache", applied=applied
    )
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents.sample(torch.arange(3), noise), expected)


@torch.no_grad()
def test_an_image_is_a_video_of_one_frame():
    pipe = text_pipes.make("wan")
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = posterior(pipe.vae, pixels)
    assert made["mean"].shape == made["std"].shape == (2, 4, 2, 2)
    expected = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    assert torch.equal(made["mean"], expected)
    shift, scale = scaling(pipe.vae)
    given = (made["mean"] - shift) * scale
    # as the pipeline's autoencoder is made
    for channel, (mean, std) in enumerate([(0.1, 2.0), (-0.2, 1.5), (0.3, 0.5), (0.0, 1.0)]):
        torch.testing.assert_close(given[:, channel], (expected[:, channel] - mean) / std)


CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(theirs_all, inspect.isclass)
    if issubclass(cls, diffusers.ModelMixin)
}


def test_every_class_is_tested():
    """A class of diffusers is shown to be right above, or refused below."""
    shown = {type(make()).__name__ for make in PICTURES} | {"AutoencoderKLWan"}
    assert shown == set(KINDS)
    assert shown < set(CLASSES)
    assert len(CLASSES) > 30


@pytest.mark.parametrize("name", sorted(set(CLASSES) - set(KINDS)))
def test_another_class_is_refused_in_a_sentence(name, make_dit):
    pipe = dit_pipe(make_dit, filled(kl))
    stranger = CLASSES[name].__new__(CLASSES[name])
    torch.nn.Module.__init__(stranger)
    vars(pipe)["vae"] = stranger
    for call in (
        lambda: decode(pipe, torch.zeros(1, 4, 8, 8)),
        lambda: posterior(stranger, torch.zeros(1, 3, 8, 8)),
        lambda: Sampling().check(pipe),
        lambda: conditioning_of(backbone_of(pipe.transformer)).pixels(pipe),
    ):
        with pytest.raises(AccelkitError, match=f"cannot map pictures by .* {name}") as caught:
            call()
        message = str(caught.value)
        assert "AutoencoderTiny" in message
        assert "\n" not in message
        assert len(message) <= 400


def test_an_own_class_is_as_the_one_it_is_derived_from(make_dit):
    class Own(diffusers.AutoencoderKL):
        pass

    with torch.no_grad():
        assert torch.equal(
            decoded(filled(Own, **LEVELS), torch.ones(1, 4, 2, 2)),
            filled(kl).decode(torch.ones(1, 4, 2, 2) / 0.18215).sample,
        )


def test_fine_tuning_behind_a_deterministic_autoencoder(make_dit, folder, tmp_path):
    dit_pipe(make_dit, filled(compressing)).save_pretrained(tmp_path / "model")
    small = ["--steps", "1", "--batch-size", "2", "--sampling-steps", "1"]
    small += ["--eval-images", "2", "--eval-batch-size", "2", "--json"]
    given = ["finetune", "--model", tmp_path / "model", "--data", folder, "-o", tmp_path / "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELKIT_CACHE", str(tmp_path / "cache"))
        command = [*map(str, given), "--schedule", "2@0.5,1@1", *small]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert [row["weights"] for row in json.loads(done.stdout)["rows"]][-1] == "tuned"
    shard = next((tmp_path / "cache" / "latents").glob("*/shard-*.safetensors"))
    assert set(load_file(shard)) == {"mean", "index"}  # no deviation


# --- another autoencoder than the network was trained with, and none


def test_an_autoencoder_that_is_put_in_later(make_dit):
    pipe = dit_pipe(make_dit, filled(kl))
    pipe.vae = filled(tiny)
    pictures, latents = own(pipe, class_labels=[1], guidance_scale=1.0)
    same_pictures(decode(pipe, latents), pictures)


def refused(call, *words):
    with pytest.raises(AccelkitError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 400
    for word in words:
        assert word in message


def test_other_latent_channels_and_no_autoencoder_are_refused(make_dit):
    calls = conditioning_of(backbone_of(make_dit(2)))
    for vae, words in (
        (filled(kl, latent_channels=3), "AutoencoderKL has 3 latent channels, its network 4"),
        (None, "no autoencoder and its network makes 4 channels"),
    ):
        pipe = dit_pipe(make_dit, vae)
        for call in (
            lambda pipe=pipe: decode(pipe, torch.zeros(1, 4, 8, 8)),
            lambda pipe=pipe: generate(pipe, [1], [0], Sampling("ddim", 1)),
            lambda pipe=pipe: Sampling().check(pipe),
            lambda pipe=pipe: calls.pixels(pipe),
        ):
            refused(call, words, "pipe.vae = ")


def test_settings_that_an_autoencoder_lacks_are_named(make_dit):
    vae = filled(hunyuan_image)
    vae.register_to_config(scaling_factor=None)
    pipe = dit_pipe(make_dit, vae)
    refused(lambda: decode(pipe, torch.zeros(1, 4, 8, 8)), "by scaling_factor", "HunyuanImage does")
    wan = text_pipes.make("wan")
    wan.vae.register_to_config(latents_std=None)
    refused(lambda: decode(wan, torch.zeros(1, 4, 8, 8)), "latents_mean and latents_std")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_of_pixels_needs_no_autoencoder(channels):
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = diffusers.DDIMPipeline(text_pipes.filled(network, 0.05), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pictures, latents = own(pipe, batch_size=2)
    same_pictures(decode(pipe, latents), pictures)


def test_latents_that_are_no_maps_are_refused():
    pipe = text_pipes.make("flux")
    refused(lambda: decode(pipe, torch.zeros(1, 16, 16)), "takes latents in maps", "(1, 16, 16)")


# --- tiles, slices and half precision


def test_tiles_and_slices_are_the_pipelines(make_dit, folder, tmp_path):
    pipe = dit_pipe(make_dit, filled(kl, sample_size=16))
    plain = encode_latents(open_source(folder), pipe.vae, size=32, cache_dir=tmp_path / "cache")
    whole, _ = own(pipe, class_labels=[1, 2], guidance_scale=1.0)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pictures, latents = own(pipe, class_labels=[1, 2], guidance_scale=1.0)
    assert np.abs(pictures - whole).max() > 0.02
    same_pictures(decode(pipe, latents), pictures)
    tiled = encode_latents(open_source(folder), pipe.vae, size=32, cache_dir=tmp_path / "cache")
    assert tiled.path != plain.path
    z, at = torch.zeros(3, *tiled.shape), torch.arange(3)
    assert (tiled.sample(at, z) - plain.sample(at, z)).abs().max() > 1e-3
    pipe.vae.tile_overlap_factor = 0.5
    other = encode_latents(open_source(folder), pipe.vae, size=32, cache_dir=tmp_path / "cache")
    assert other.path != tiled.path


def overflowing(pipe):
    """Let the last of the decoder's and encoder's levels exceed what float16 can hold."""
    with torch.no_grad():
        for half in (pipe.vae.encoder, pipe.vae.decoder):
            half.conv_in.weight *= 1e5
            half.conv_in.bias *= 1e5
    return pipe.vae


def test_an_autoencoder_that_overflows_in_half_precision(folder, tmp_path):
    """XL's pipeline decodes in float32; Stable Diffusion's does not, and its pictures are black."""
    pipe = text_pipes.make("sdxl")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    overflowing(pipe)
    whole = encode_latents(open_source(folder), pipe.vae, size=16, cache_dir=tmp_path / "cache")
    pipe.vae.half()
    with torch.no_grad():
        assert not pipe.vae.decode(torch.ones(1, 4, 2, 2).half()).sample.isfinite().all()
    pictures, latents = own(pipe, prompt="a red bird", **OPTIONS["sdxl"])
    same_pictures(decode(pipe, latents), pictures)
    assert pipe.vae.dtype == torch.float16
    half = encode_latents(open_source(folder), pipe.vae, size=16, cache_dir=tmp_path / "cache")
    z, at = torch.zeros(3, *half.shape), torch.arange(3)
    torch.testing.assert_close(half.sample(at, z), whole.sample(at, z), rtol=0.02, atol=0.02)

    pipe.vae.register_to_config(force_upcast=False)
    refused(lambda: posterior(pipe.vae, torch.ones(1, 3, 16, 16)), "latents that are not finite")
    sd = text_pipes.make("sd")
    overflowing(sd).half()
    refused(
        lambda: decode(sd, torch.ones(1, 4, 8, 8).half()),
        "this AutoencoderKL made pictures that are not finite, in float16",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_the_pipeline(dtype, make_dit):
    pipe = dit_pipe(make_dit, filled(kl)).to(dtype)
    pictures, latents = own(pipe, class_labels=[1, 2], guidance_scale=1.0)
    same_pictures(decode(pipe, latents), pictures, off=1)


def test_an_autoencoder_in_another_precision_than_its_network(make_dit):
    pipe = dit_pipe(make_dit, filled(kl))
    latents = inputs([1, 2])[0]
    expected = decode(pipe, latents)
    np.testing.assert_allclose(decode(pipe, latents.bfloat16()).astype(int), expected, atol=8)


# --- pipelines that are watched


class Centred(diffusers.AuraFlowPipeline):
    """Gives its autoencoder something that no setting explains."""

    def __call__(self, *args, **kwargs):
        decode = self.vae.decode
        self.vae.decode = lambda z, **rest: decode(z - z.mean() + 3, **rest)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del self.vae.decode

    __call__.__signature__ = inspect.signature(diffusers.AuraFlowPipeline.__call__)


def test_a_pipeline_that_decodes_in_a_way_of_its_own_is_refused():
    pipe = Centred(**text_pipes.make("auraflow").components)
    refused(lambda: learn(pipe), "its autoencoder is not given the scaled latents")
    refused(lambda: decode(pipe, torch.zeros(1, 4, 8, 8)), "is not given the scaled latents")
    assert "decode" not in vars(pipe.vae)
