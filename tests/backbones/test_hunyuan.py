"""HunyuanDiT: schedules on diffusers' own network, whose dropped blocks keep their long skips."""

import copy
import math

import pytest
import torch
from families import ALPHA_BAR, Compiled, Family, close, draws, randomized

from accelkit.backbones import backbone_of
from accelkit.compute import Compute
from accelkit.errors import AccelkitError
from accelkit.runtime.switch import disable, enable
from accelkit.schedule import Schedule

FIRST = 6  # of the counted blocks: five encode, one is in the middle


class TestHunyuan(Compiled, Family):
    lists = ("blocks",)
    moments = (100, 500, 900)

    def build(self, layers=10):
        from diffusers import HunyuanDiT2DModel

        return HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=layers,
            mlp_ratio=2.0,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            text_len=3,
            text_len_t5=4,
        )

    def inputs(self, batch):
        draw = draws()
        which = torch.arange(batch) % 2
        return {
            "hidden_states": draw(batch, 4, 8, 8),
            "encoder_hidden_states": draw(batch, 3, 8),
            "text_embedding_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])[which],
            "encoder_hidden_states_t5": draw(batch, 4, 8),
            "text_embedding_mask_t5": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])[which],
            "image_meta_size": draw(batch, 6).abs() * 100,
            "style": torch.zeros(batch, dtype=torch.long),
            "image_rotary_emb": (draw(16, 8), draw(16, 8)),
        }

    shared = ("image_rotary_emb",)

    def pipeline(self, model):
        from diffusers import HunyuanDiTPipeline

        draw, given = draws(), {}
        for sign in ("", "negative_"):
            for suffix, length, width in (("", 3, 8), ("_2", 4, 8)):
                given[f"{sign}prompt_embeds{suffix}"] = draw(1, length, width)
                given[f"{sign}prompt_attention_mask{suffix}"] = torch.ones(1, length).long()
        pipe = HunyuanDiTPipeline(
            *(None, None, None, model, self.scheduler(), None, None),
            requires_safety_checker=False,
        )
        return pipe, {
            **given,
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

    def mixed(self, order=(2, 0, 1, 0)):
        call, depths = super().mixed(order)
        return {**call, "timestep": call["timestep"].float()}, depths  # embeds it in its own dtype

    def cut(self, model, depth):
        """The network whose decoder blocks behind ``depth`` are their skip projections alone."""
        short = copy.deepcopy(model)
        for block in short.blocks[FIRST + depth :]:

            def project(hidden_states, skip, block=block, **_):
                return block.skip_linear(block.skip_norm(torch.cat([hidden_states, skip], -1)))

            block.forward = project
        return short

    def watch(self, model):
        seen = []
        for block in model.blocks[FIRST:]:
            block.norm1.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        return seen

    def test_the_family_is_found_by_class(self, model):
        backbone = backbone_of(model)
        assert list(backbone.blocks) == list(model.blocks[FIRST:])
        assert list(backbone.all_blocks) == list(model.blocks)
        assert not any(backbone.attentions())  # its positions are rotary
        assert backbone.time_embedders == [model.time_extra_emb.timestep_embedder]

    @pytest.mark.skip("diffusers gives this network no gradient checkpointing")
    def test_checkpointing_changes_no_gradient(self):
        pass

    @torch.no_grad()
    def test_no_depth_at_all_leaves_the_projections(self, model):
        call, _ = self.mixed()
        expected = self.cut(model, 0)(**call).sample
        shallow = self.cut(model, 1)(**call).sample
        assert not torch.allclose(expected, shallow)
        with self.on(model, "4@0.3,0@1"):
            close(model(**call).sample[:1], expected[:1])
        with self.on(model, "uniform:0"):
            assert torch.equal(model(**call).sample, expected)

    @torch.no_grad()
    def test_the_residuals_of_a_controlnet_are_in_the_skips(self, model):
        call, depths = self.mixed()
        draw = draws(5)
        residuals = [draw(4, 16, 16) for _ in range(4)]
        singles = []
        for i, depth in enumerate(depths):
            own = {"controlnet_block_samples": [r[i : i + 1] for r in residuals]}
            singles.append(self.cut(model, depth)(**self.one(call, i), **own).sample)
        plain = self.by_hand(model, call, depths)
        assert not torch.allclose(torch.cat(singles), plain)
        with self.on(model):
            close(
                model(**call, controlnet_block_samples=list(residuals)).sample, torch.cat(singles)
            )

    @torch.no_grad()
    def test_every_input_of_a_sample_moves_with_it(self, model):
        call, _ = self.mixed()
        turned = {k: v if k in self.shared else v.flip(0) for k, v in call.items()}
        with self.on(model):
            close(model(**turned).sample, model(**call).sample.flip(0))

    def test_the_presets_of_uvit_by_fraction(self, model):
        schedule = Schedule.parse("D6", 18, "hunyuan")
        assert [c.depth for c in schedule.computes] == [15, 9, 6, 3]
        assert schedule.family == "hunyuan"
        assert Schedule.parse("uniform:0", 4, "hunyuan").computes == (Compute(0),)
        with enable(model, "D1") as state:
            assert state.schedule.depths == (1, 2, 3, 4)
        with pytest.raises(
            AccelkitError, match="counts blocks as the uvit family does, this is a huny"
        ):
            enable(model, Schedule.parse("D1", 4, "uvit"))

    @torch.no_grad()
    def test_no_decoder_is_no_schedule(self):
        with pytest.raises(AccelkitError, match=r"2 blocks has none behind its middle one"):
            enable(randomized(lambda: self.build(2)), "full")
        model = randomized(lambda: self.build(4))
        self.on(model, "uniform:0")
        disable(model)
