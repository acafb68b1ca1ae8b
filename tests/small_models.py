"""Small networks of several families, the same cut by hand, and calls of them at each depth."""

import diffusers
import pytest
import torch

from accelkit.models import UViTTransformer2DModel
from accelkit.runtime.switch import enable

WIDTH = 16


def filled(network, std=0.1):
    """The network in eval mode with fixed weights, none of them zero."""
    draw = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=draw)
    return network.eval()


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


class DiT:
    schedule, depths = "6@0.3,4@0.6,2@1", {100: 6, 500: 4, 900: 2}
    layers = 6

    def make(self):
        return filled(
            diffusers.DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=self.layers,
                sample_size=8,
            )
        )

    def call(self, timestep):
        return {
            "hidden_states": seeded(2, 4, 8, 8),
            "timestep": torch.full((2,), timestep),
            "class_labels": torch.arange(2),
        }

    def cut(self, model, depth):
        model.transformer_blocks = torch.nn.ModuleList(list(model.transformer_blocks)[:depth])
        return model


class ShortDiT(DiT):
    schedule, depths = "3@0.3,2@0.6,1@1", {100: 3, 500: 2, 900: 1}
    layers = 3


class UViT:
    schedule, depths = "2@0.3,1@0.6,0@1", {100: 2, 500: 1, 900: 0}

    def make(self):
        return filled(
            UViTTransformer2DModel(
                sample_size=8,
                in_channels=4,
                num_layers=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_classes=11,
                null_class=10,
            )
        )

    def call(self, timestep):
        return {
            "sample": seeded(2, 4, 8, 8),
            "timestep": torch.full((2,), timestep),
            "class_labels": torch.arange(2),
        }

    def cut(self, model, depth):
        for block in list(model.out_blocks)[depth:]:
            block.forward = lambda hidden_states, skip, block=block: block.join(hidden_states, skip)
        return model


class Flux:
    schedule, depths = "6@0.3,5@0.6,2@1", {100: 6, 500: 5, 900: 2}

    def make(self):
        return filled(
            diffusers.FluxTransformer2DModel(
                in_channels=4,
                num_layers=3,
                num_single_layers=3,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                axes_dims_rope=(4, 2, 2),
            ),
            0.2,
        )

    def call(self, timestep):
        return {
            "hidden_states": seeded(2, 6, 4),
            "encoder_hidden_states": seeded(2, 5, WIDTH),
            "pooled_projections": seeded(2, WIDTH),
            "timestep": torch.full((2,), timestep / 1000),
            "img_ids": torch.arange(18).view(6, 3) % 4,
            "txt_ids": torch.zeros(5, 3),
        }

    def cut(self, model, depth):
        double, single = list(model.transformer_blocks), list(model.single_transformer_blocks)
        model.transformer_blocks = torch.nn.ModuleList(double[:depth])
        model.single_transformer_blocks = torch.nn.ModuleList(single[: max(0, depth - 3)])
        return model


class SD3(DiT):
    def make(self):
        return filled(
            diffusers.SD3Transformer2DModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=6,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=WIDTH,
                pos_embed_max_size=8,
            )
        )

    def call(self, timestep):
        return {
            "hidden_states": seeded(2, 4, 8, 8),
            "encoder_hidden_states": seeded(2, 5, WIDTH),
            "pooled_projections": seeded(2, WIDTH),
            "timestep": torch.full((2,), timestep),
        }


class PixArt(DiT):
    def make(self):
        return filled(
            diffusers.PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=6,
                cross_attention_dim=16,
                caption_channels=WIDTH,
                sample_size=8,
                use_additional_conditions=False,
            )
        )

    def call(self, timestep):
        return {
            "hidden_states": seeded(2, 4, 8, 8),
            "encoder_hidden_states": seeded(2, 5, WIDTH),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "timestep": torch.full((2,), timestep),
        }


def mixed(family, timesteps):
    """A call with one sample for each timestep, all different."""
    count = len(timesteps)
    call = family.call(100) | {"timestep": torch.tensor(timesteps)}
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and name != "timestep":
            call[name] = seeded(count, *value.shape[1:]) if value.ndim > 1 else torch.arange(count)
    return call


@torch.no_grad()
def outputs(family, model):
    """The model's outputs at each of the depths, twice."""
    return [model(**family.call(t)).sample for t in (*family.depths, *family.depths)]


@torch.no_grad()
def by_hand(family, make):
    """The same outputs by networks cut by hand."""
    found = [family.cut(make(), d)(**family.call(t)).sample for t, d in family.depths.items()]
    assert (found[0] - found[-1]).abs().max() > 1e-3
    return found * 2


def close(found, expected, atol=2e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol * max(1.0, float(b.abs().max())), rtol=1e-5)


def both(model, family, other, first):
    """Apply ``other`` to a model before its schedule or after it."""
    if first == "other":
        other(model)
    enable(model, family.schedule)
    if first == "schedule":
        other(model)
    return model


each = pytest.mark.parametrize("first", ["other", "schedule"])


def families(*kinds):
    return pytest.mark.parametrize("family", [k() for k in kinds], ids=[k.__name__ for k in kinds])
