"""Wan: schedules on diffusers' own video network."""

import pytest
import text_pipes
import torch
from families import Compiled, Family, close, draws, randomized

from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.runtime.switch import disable, enable, enabled_on


class TestWan(Compiled, Family):
    lists = ("blocks",)
    timestep_weights = "time_embedder."

    def build(self, **config):
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=10,
            freq_dim=16,
            ffn_dim=32,
            num_layers=4,
            rope_max_seq_len=16,
            **config,
        )

    def inputs(self, batch):
        draw = draws()
        return {
            "hidden_states": draw(batch, 4, 3, 4, 6),
            "encoder_hidden_states": draw(batch, 5, 10),
        }

    def pipeline(self, model):
        from diffusers import WanPipeline

        draw = draws()
        return WanPipeline(None, None, None, self.scheduler(), model), {
            "prompt_embeds": draw(1, 5, 10),
            "negative_prompt_embeds": draw(1, 5, 10),
            "height": 64,
            "width": 64,
            "num_frames": 9,
        }

    def blocks_of_step(self, depth):
        return [depth, depth]  # with and without the prompt, one after the other

    @torch.no_grad()
    def test_the_image_of_a_sample_moves_with_it(self):
        model = randomized(lambda: self.build(image_dim=7, added_kv_proj_dim=24))
        call, depths = self.mixed()
        call["encoder_hidden_states"] = draws(2)(4, 512, 10)  # the number of text tokens it expects
        call["encoder_hidden_states_image"] = draws(3)(4, 5, 7)
        other = call | {"encoder_hidden_states_image": draws(4)(4, 5, 7)}
        expected = self.by_hand(model, call, depths)
        assert not torch.allclose(self.by_hand(model, other, depths), expected)
        with self.on(model):
            close(model(**call).sample, expected)

    @pytest.mark.parametrize("depth", [1, 3])
    @torch.no_grad()
    def test_half_precision_exits_through_the_float32_norm(self, model, depth):
        model.to(torch.bfloat16)
        call = {k: v.to(torch.bfloat16) for k, v in self.inputs(2).items()}
        call["timestep"] = torch.tensor([500.0, 500.0])
        expected = self.cut(model, depth)(**call).sample
        with self.on(model, f"uniform:{depth}"):
            output = model(**call).sample
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected)

    @torch.no_grad()
    def test_a_timestep_for_every_token_is_refused(self, model):
        call = self.inputs(2) | {"timestep": torch.full((2, 18), 500.0)}
        output = model(**call).sample
        self.on(model)
        with pytest.raises(AccelkitError, match=r"timestep for every token, \(2, 18\)"):
            model(**call)
        disable(model)
        assert torch.equal(model(**call).sample, output)

    def test_the_other_network_of_a_pipeline_is_told_of(self):
        pipe = text_pipes.make("wan")
        twin = randomized(lambda: type(pipe.transformer).from_config(pipe.transformer.config))
        pipe.register_modules(transformer_2=twin)
        with pytest.warns(AccelkitWarning, match="has two networks, of which the"):
            enable(pipe, "uniform:2")
        enable(pipe.transformer_2, "uniform:2", scheduler=pipe.scheduler)
        assert enabled_on(pipe.transformer_2).schedule == enabled_on(pipe).schedule
        pipe.register_modules(transformer=None)
        with pytest.raises(TypeError, match="WanPipeline has no network named transformer or unet"):
            enable(pipe, "uniform:2")

    @torch.no_grad()
    def test_first_and_last_images_go_with_one_timestep(self):
        config = {"image_dim": 7, "added_kv_proj_dim": 24, "pos_embed_seq_len": 10}
        model = randomized(lambda: self.build(**config))
        call = self.inputs(2) | {"encoder_hidden_states_image": draws(3)(4, 5, 7)}
        call["encoder_hidden_states"] = draws(2)(2, 512, 10)
        alike = [torch.tensor([990, 990]), torch.tensor(990).expand(2)]
        expected = self.cut(model, 1)(**call, timestep=alike[0]).sample
        with self.on(model):
            for timestep in alike:
                assert torch.equal(model(**call, timestep=timestep).sample, expected)
            with pytest.raises(AccelkitError, match="2 with a first and a last image"):
                model(**call, timestep=torch.tensor([990, 100]))
