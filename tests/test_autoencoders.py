"""Images to latents and back, by the pipelines' own scale."""

import numpy as np
import pytest
import text_pipes
import torch

from accelkit.autoencoders import decoded, posterior, scaling

OPTIONS = {
    "sd": {"height": 16, "width": 16},
    "sd3": {"height": 16, "width": 16},
    "wan": {"height": 64, "width": 64, "num_frames": 1},
}


@pytest.mark.parametrize("family", OPTIONS)
def test_latents_become_the_images_that_the_pipeline_makes_of_them(family):
    pipe = text_pipes.make(family)
    kinds = {}
    for kind in ("latent", "np"):
        draw = torch.Generator().manual_seed(0)
        options = {**OPTIONS[family], "num_inference_steps": 1, "output_type": kind}
        kinds[kind] = pipe("a red bird", generator=draw, return_dict=False, **options)[0]
    latents = kinds["latent"].squeeze(2) if family == "wan" else kinds["latent"]
    with torch.no_grad():
        images = (decoded(pipe.vae, latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    theirs = np.asarray(kinds["np"]).reshape(images.shape)
    assert theirs.std() > 0.01
    np.testing.assert_allclose(images.numpy(), theirs, atol=1e-5)


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
