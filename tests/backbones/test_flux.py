"""FLUX: two block lists under one depth, on diffusers' own network."""

import numpy as np
import pytest
import torch
from families import ALPHA_BAR, Compiled, Family, WithResiduals, close, draws, randomized

from accelkit.backbones.flux import Flux
from accelkit.runtime.switch import enable


class TestFlux(Compiled, WithResiduals, Family):
    """Two double blocks and two single ones: depth 1 leaves among the former, 3 the latter."""

    lists = ("transformer_blocks", "single_transformer_blocks")
    shared = ("img_ids", "txt_ids")
    scale = 1e-3

    def build(self):
        from diffusers import FluxTransformer2DModel

        return FluxTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        )

    def inputs(self, batch):
        draw = draws()
        places = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), -1)
        ids = torch.cat([torch.zeros(12, 1), places.reshape(12, 2)], dim=1)
        return {
            "hidden_states": draw(batch, 12, 4),
            "encoder_hidden_states": draw(batch, 5, 12),
            "pooled_projections": draw(batch, 10),
            "img_ids": ids,
            "txt_ids": torch.zeros(5, 3),
            "guidance": torch.linspace(1, 7, batch),
        }

    def pipeline(self, model):
        from diffusers import FluxPipeline

        draw = draws()
        return FluxPipeline(self.scheduler(), *[None] * 5, model), {
            "prompt_embeds": draw(1, 5, 12),
            "pooled_prompt_embeds": draw(1, 10),
            "height": 64,
            "width": 64,
        }

    def residuals(self, batch):
        draw = draws(7)
        return {
            "controlnet_block_samples": [draw(batch, 12, 16)],
            "controlnet_single_block_samples": [draw(batch, 12, 16) for _ in range(2)],
        }

    def kept(self, call, depth):
        return call  # one for all double blocks, one for each single block: the same where cut

    def test_double_blocks_come_first(self, model):
        assert Flux(model).blocks == [
            *model.transformer_blocks,
            *model.single_transformer_blocks,
        ]

    @pytest.mark.parametrize("depth", [1, 2, 3])
    @torch.no_grad()
    def test_an_exit_keeps_the_residuals_that_repeat(self, model, depth):
        draw = draws(7)
        call = self.mixed()[0] | {
            "controlnet_block_samples": [draw(4, 12, 16) for _ in range(2)],
            "controlnet_blocks_repeat": True,
        }
        expected = self.cut(model, depth)(**call).sample
        with self.on(model, f"uniform:{depth}"):
            assert torch.equal(model(**call).sample, expected)

    @torch.no_grad()
    def test_ids_are_shared_even_if_they_are_as_many_as_samples(self, model):
        call, depths = self.mixed((2, 0, 1, 0, 1))
        assert len(call["txt_ids"]) == len(depths)
        expected = self.by_hand(model, call, depths)
        with self.on(model):
            close(model(**call).sample, expected)

    @torch.no_grad()
    def test_an_image_prompt_moves_with_its_sample(self, model):
        from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
        from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

        def adapter():
            projection = ImageProjection(6, 12, num_image_text_embeds=2)
            model.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
            for block in model.transformer_blocks:
                processor = FluxIPAdapterAttnProcessor(16, 12, num_tokens=(2,), scale=[1.0])
                block.attn.set_processor(processor)
            return model

        randomized(adapter)
        call, depths = self.mixed()
        call["joint_attention_kwargs"] = {"ip_adapter_image_embeds": [draws(3)(4, 1, 6)]}
        other = call | {"joint_attention_kwargs": {"ip_adapter_image_embeds": [draws(4)(4, 1, 6)]}}
        expected = self.by_hand(model, call, depths)
        assert not torch.allclose(self.by_hand(model, other, depths), expected)
        with self.on(model):
            close(model(**call).sample, expected)
        assert list(call["joint_attention_kwargs"]) == ["ip_adapter_image_embeds"]

    @torch.no_grad()
    def test_half_precision_finds_its_step_again(self, model):
        """The pipeline rounds t to the latents' type, divides and rounds once more."""
        model.to(torch.bfloat16)
        scheduler = self.scheduler()
        scheduler.set_timesteps(20)
        given = scheduler.timesteps.to(torch.bfloat16) / 1000
        moved = [
            (t, g) for t, g in zip(scheduler.timesteps, given, strict=True) if g < t / 1000 - 1e-3
        ]
        assert moved
        call = {k: v.to(torch.bfloat16) for k, v in self.inputs(1).items()}
        for t, rounded in moved:
            # between the two the depth changes
            edge = (self.level(float(t)) + self.level(1000 * float(rounded))) / 2
            expected = self.cut(model, 1)(**call, timestep=rounded[None]).sample
            with enable(model, f"4@{edge},1@1", scheduler=scheduler):
                output = model(**call, timestep=rounded[None]).sample
            assert torch.equal(output, expected)

    def level(self, timestep):
        """Where on the linear-beta process the log-SNR is the same, as a share of its steps."""
        log_snr = np.log(ALPHA_BAR / (1 - ALPHA_BAR))
        return np.interp(-self.log_snr(timestep), -log_snr, np.arange(1000) / 1000)
