"""Sana: schedules on diffusers' own network."""

import math

import pytest
import torch
from families import Compiled, Family, WithResiduals, draws

from accelkit.backbones.sana import Sana


class TestSana(Compiled, WithResiduals, Family):
    scale = 0.25

    def build(self, **config):
        from diffusers import SanaTransformer2DModel

        return SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=12,
            sample_size=6,
            timestep_scale=0.25,
            **config,
        )

    def inputs(self, batch):
        draw = draws()
        masks = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
        return {
            "hidden_states": draw(batch, 4, 6, 4),
            "encoder_hidden_states": draw(batch, 5, 12),
            "encoder_attention_mask": masks[torch.arange(batch) % 2],
        }

    def residuals(self, batch):
        draw = draws(7)
        return {"controlnet_block_samples": tuple(draw(batch, 24, 16) for _ in range(2))}

    def kept(self, call, depth):
        return call  # the first residual comes behind the second block, and so on

    def pipeline(self, model):
        from diffusers import SanaPipeline

        draw, mask = draws(), torch.ones(1, 5)
        return SanaPipeline(None, None, None, model, self.scheduler()), {
            "prompt_embeds": draw(1, 5, 12),
            "prompt_attention_mask": mask,
            "negative_prompt": None,
            "negative_prompt_embeds": draw(1, 5, 12),
            "negative_prompt_attention_mask": mask,
            "height": 192,
            "width": 192,
            "use_resolution_binning": False,
        }


class TestSanaSprint(Family):
    """Steps are angles, of which the network is given another function: see its pipeline."""

    moments = (0.1, 1.2, 1.55)

    def build(self):
        return TestSana().build(guidance_embeds=True)

    def inputs(self, batch):
        return TestSana().inputs(batch) | {"guidance": torch.linspace(0.1, 0.7, batch)}

    def scheduler(self):
        from diffusers import SCMScheduler

        return SCMScheduler()

    def log_snr(self, timestep):
        return -2 * math.log(math.tan(timestep))  # x = cos a x_0 + sin a noise

    def steps(self, scheduler, count):
        scheduler.set_timesteps(count, max_timesteps=1.57, intermediate_timesteps=None)
        return self.visited(scheduler)

    def visited(self, scheduler):
        return scheduler.timesteps[:-1]  # the last one is where it arrives

    def given(self, angle):
        return angle.sin() / (angle.cos() + angle.sin())

    def pipeline(self, model):
        from diffusers import SanaSprintPipeline

        return SanaSprintPipeline(None, None, None, model, self.scheduler()), {
            "prompt_embeds": draws()(1, 5, 12),
            "prompt_attention_mask": torch.ones(1, 5),
            "height": 192,
            "width": 192,
            "use_resolution_binning": False,
            "intermediate_timesteps": None,
            "max_timesteps": 1.57,
        }

    def test_the_network_is_given_what_the_pipeline_gives_it(self, model):
        angles = torch.linspace(0.05, 1.55, 7, dtype=torch.float64)
        given = Sana(model).model_timestep(angles)
        torch.testing.assert_close(given, self.given(angles))
        back = [Sana(model).scheduler_timestep(float(s)) for s in given]
        assert back == pytest.approx(angles.tolist())
