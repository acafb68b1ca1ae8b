"""PixArt-alpha and PixArt-Sigma: schedules on diffusers' own network."""

import math

import pytest
import torch
from families import ALPHA_BAR, Compiled, Family, close, draws, randomized

from accelkit.backbones.pixart import PixArt
from accelkit.errors import AccelkitError


class TestPixArt(Compiled, Family):
    moments = (100, 500, 900)

    def build(self, sizes=True):
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            cross_attention_dim=24,
            caption_channels=12,
            sample_size=8,
            use_additional_conditions=sizes,
        )

    def inputs(self, batch):
        draw = draws()
        return {
            "hidden_states": draw(batch, 4, 8, 8),
            "encoder_hidden_states": draw(batch, 5, 12),
            "added_cond_kwargs": {
                "resolution": draw(batch, 2).abs() * 100,
                "aspect_ratio": draw(batch, 1).abs(),
            },
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])[
                torch.arange(batch) % 2
            ],
            "attention_mask": (draw(batch, 16) > -1).float(),
        }

    def pipeline(self, model):
        from diffusers import PixArtSigmaPipeline

        draw, mask = draws(), torch.ones(1, 5)
        # the pipeline gives sizes to networks of 128 x 128 latents only
        model.use_additional_conditions = model.adaln_single.emb.use_additional_conditions = False
        return PixArtSigmaPipeline(None, None, None, model, self.scheduler()), {
            "prompt_embeds": draw(1, 5, 12),
            "prompt_attention_mask": mask,
            "negative_prompt": None,
            "negative_prompt_embeds": draw(1, 5, 12),
            "negative_prompt_attention_mask": mask,
            "height": 64,
            "width": 64,
            "use_resolution_binning": False,
        }

    def scheduler(self):
        from diffusers import DDIMScheduler

        return DDIMScheduler()  # linear betas

    def log_snr(self, timestep):
        alpha_bar = ALPHA_BAR[int(timestep)]
        return math.log(alpha_bar / (1 - alpha_bar))

    @torch.no_grad()
    def test_every_input_of_a_sample_moves_with_it(self, model):
        call, _ = self.mixed()
        turned = {k: self._turned(v) for k, v in call.items()}
        others = (
            {"encoder_attention_mask": torch.ones(4, 5)},
            {"attention_mask": torch.ones(4, 16)},
            {"added_cond_kwargs": {k: v + 1 for k, v in call["added_cond_kwargs"].items()}},
        )
        with self.on(model):
            output = model(**call).sample
            close(model(**turned).sample, output.flip(0))
            for other in others:
                assert not torch.allclose(model(**call | other).sample, output)

    def _turned(self, value):
        if isinstance(value, dict):
            return {k: v.flip(0) for k, v in value.items()}
        return value.flip(0)

    @torch.no_grad()
    def test_without_size_conditions_as_in_sigma(self):
        model = randomized(lambda: self.build(sizes=False))
        call, depths = self.mixed()
        call["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
        expected = self.by_hand(model, call, depths)
        with self.on(model):
            close(model(**call).sample, expected)

    def test_tokens_are_merged_in_the_attention_over_patches(self, model):
        own = [[block.attn1] for block in model.transformer_blocks]
        assert PixArt(model).attentions() == own
        call, _ = self.mixed()
        assert PixArt(model).grid(call | {"attention_mask": None}) == (4, 4)
        with self.on(model, "tome:0.3"), pytest.raises(AccelkitError, match="attention_mask"):
            model(**call)
