"""Image-to-image pipelines start in the middle of their steps, at the depth for that noise."""

import diffusers
import pytest
import text_pipes
import torch

from accelkit.backbones import backbone_of, denoiser_of
from accelkit.noise.axis import NoiseAxis
from accelkit.runtime.switch import enable

KINDS = {
    "sd": diffusers.StableDiffusionImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux": diffusers.FluxImg2ImgPipeline,
}
RUNS = (torch.nn.Linear, torch.nn.Conv2d)


@pytest.mark.parametrize("strength", [0.3, 0.8])
@pytest.mark.parametrize("family", KINDS)
def test_every_step_left_runs_what_its_noise_asks_for(family, strength):
    pipe = KINDS[family].from_pipe(text_pipes.make(family))
    pipe.set_progress_bar_config(disable=True)
    model, ran = denoiser_of(pipe), []
    model.register_forward_pre_hook(lambda *_: ran.append(0))

    def count(module, args):
        ran[-1] += 1

    for block in backbone_of(model).blocks:
        layer = next(m for m in block.modules() if isinstance(m, RUNS))
        layer.register_forward_pre_hook(count)
    with enable(pipe, "4@0.4,3@0.5,2@1") as state:
        pipe(
            "a red bird",
            image=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
            strength=strength,
            num_inference_steps=10,
            guidance_scale=2.0,
            output_type="latent",
            **({} if family == "sd" else {"height": 16, "width": 16}),
        )
    timesteps = pipe.scheduler.timesteps[10 - int(10 * strength) :]
    levels = NoiseAxis.of(pipe.scheduler).levels(timesteps)
    assert ran == [state.schedule.depth_at(level) for level in levels]
    assert set(ran) == ({2, 3, 4} if strength == 0.8 else {4})
