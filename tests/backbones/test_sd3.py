"""Stable Diffusion 3 and 3.5: schedules on diffusers' own network."""

import pytest
import torch
from families import Compiled, Family, WithResiduals, close, draws, randomized


class TestSD3(Compiled, WithResiduals, Family):
    """The first two blocks have the second attention of SD3.5, the last one drops the text."""

    def build(self, **config):
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            pos_embed_max_size=8,
            **{"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} | config,
        )

    def inputs(self, batch):
        draw = draws()
        return {
            "hidden_states": draw(batch, 4, 8, 8),
            "encoder_hidden_states": draw(batch, 5, 12),
            "pooled_projections": draw(batch, 10),
        }

    def pipeline(self, model):
        from diffusers import StableDiffusion3Pipeline

        draw = draws()
        return StableDiffusion3Pipeline(model, self.scheduler(), *[None] * 7), {
            "prompt_embeds": draw(1, 5, 12),
            "negative_prompt_embeds": draw(1, 5, 12),
            "pooled_prompt_embeds": draw(1, 10),
            "negative_pooled_prompt_embeds": draw(1, 10),
            "height": 64,
            "width": 64,
            "skip_guidance_layers": [1],
            "skip_layer_guidance_start": -1,
            "skip_layer_guidance_stop": 1,
        }

    def blocks_of_step(self, depth):
        return [depth, depth - (depth > 1)]  # guided, then once more without block 1

    def residuals(self, batch):
        draw = draws(7)
        return {"block_controlnet_hidden_states": [draw(batch, 16, 16) for _ in range(3)]}

    def kept(self, call, depth):
        # four blocks share three residuals, 4/3 blocks each; the last block gets none
        given, name = call["block_controlnet_hidden_states"], "block_controlnet_hidden_states"
        return call | {name: [given[i] for i in (0, 0, 1, 2)[:depth]]}

    @torch.no_grad()
    def test_without_dual_attention_as_in_sd3(self):
        model = randomized(lambda: self.build(dual_attention_layers=(), qk_norm=None))
        call, depths = self.mixed()
        expected = self.by_hand(model, call, depths)
        with self.on(model):
            close(model(**call).sample, expected)

    @pytest.mark.parametrize("schedule", ["4@0.3,2@0.6,1@1", "3@0.3,2@0.6,1@1", "2@0.6,1@1"])
    @pytest.mark.parametrize("skipped", [[1], [2], [3], [2, 3], [1, 2, 3], [0, 2]])
    @torch.no_grad()
    def test_skip_layer_guidance_skips_blocks_of_its_own(self, model, schedule, skipped):
        deepest = int(schedule[0])
        call, depths = self.mixed()[0] | {"skip_layers": skipped}, [1, deepest, 2, deepest]
        expected = self._by_hand_without(model, call, depths, skipped)
        with self.on(model, schedule):
            close(model(**call).sample, expected)
            for i in range(4):
                alone = self.one(call, i) | {"skip_layers": skipped}
                close(model(**alone).sample, expected[i : i + 1])

    def _by_hand_without(self, model, call, depths, skipped):
        parts = []
        for i, depth in enumerate(depths):
            short = self.cut(model, depth)
            kept = [b for j, b in enumerate(short.transformer_blocks) if j not in skipped]
            short.transformer_blocks = torch.nn.ModuleList(kept)
            alone = {k: v for k, v in self.one(call, i).items() if k != "skip_layers"}
            parts.append(short(**alone).sample)
        return torch.cat(parts)

    @torch.no_grad()
    def test_an_image_prompt_moves_with_its_sample(self, model):
        from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
        from diffusers.models.embeddings import IPAdapterTimeImageProjection

        def adapter():
            model.image_proj = IPAdapterTimeImageProjection(
                embed_dim=6,
                output_dim=16,
                hidden_dim=16,
                depth=1,
                dim_head=8,
                heads=2,
                num_queries=3,
                timestep_in_dim=16,
                timestep_flip_sin_to_cos=True,
                timestep_freq_shift=0,
            )
            for block in model.transformer_blocks:
                block.attn.processor = SD3IPAdapterJointAttnProcessor2_0(16, 16, 8, 16)
                # kept where the model's weights are, so that they are drawn and copied with them
                block.attn.ip = block.attn.processor
            return model

        randomized(adapter)
        call, depths = self.mixed()
        call["joint_attention_kwargs"] = {"ip_adapter_image_embeds": draws(3)(4, 2, 6)}
        other = call | {"joint_attention_kwargs": {"ip_adapter_image_embeds": draws(4)(4, 2, 6)}}
        expected = self.by_hand(model, call, depths)
        assert not torch.allclose(self.by_hand(model, other, depths), expected)
        with self.on(model):
            close(model(**call).sample, expected)
        assert list(call["joint_attention_kwargs"]) == ["ip_adapter_image_embeds"]
