"""The cost of a network call, against a closed form."""

from itertools import pairwise

import pytest
import torch
from diffusers import DiTTransformer2DModel

from accelkit.backbones import backbone_of
from accelkit.compute import Compute, Merge
from accelkit.cost import cost_of, ideal_saving, macs, macs_by_depth
from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.models import UViTTransformer2DModel
from accelkit.schedule import Schedule


def dit(**options):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 6, "sample_size": 8}
    channels = {"in_channels": 4, "out_channels": 8}
    return DiTTransformer2DModel(**{**sizes, **channels, **options})


def closed_form(model, depth):
    """MACs of one sample at ``depth`` blocks: matrix products, convolution and attention."""
    c = model.config
    width = c.num_attention_heads * c.attention_head_dim
    tokens = (c.sample_size // c.patch_size) ** 2
    embedder = 256 * width + width**2
    # queries, keys, values, output and an MLP of four times the width, per token
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2 + embedder
    patches = c.patch_size**2 * tokens * width * (c.in_channels + c.out_channels)
    # the exit's modulation runs the first block's embedder once more
    return depth * block + patches + 2 * width**2 + embedder


def test_dit_xl_2_costs_what_is_published():
    with torch.device("meta"):
        model = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
        )
    costs = macs_by_depth(model)
    embedder = 256 * 1152 + 1152**2
    # Peebles and Xie 2023, table 4: 118.64 Gflops, which counts element-wise work as well. The
    # original runs one embedder once; diffusers has one in each block, and the exit runs the first
    # block's again.
    once = costs[-1] - 28 * embedder
    assert once / 1e9 == pytest.approx(118.62, abs=0.01)
    assert [b - a for a, b in pairwise(costs)] == [costs[1] - costs[0]] * 27
    assert (costs[1] - costs[0] - embedder) / 1e9 == pytest.approx(4.2358, abs=1e-4)
    assert [costs[0], costs[11], costs[27]] == [closed_form(model, d) for d in (1, 12, 28)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 1},
        {"patch_size": 4, "sample_size": 16},
        {"in_channels": 3, "out_channels": 3},
    ],
)
def test_any_dit_costs_its_closed_form(options):
    model = dit(**options)
    depths = range(1, model.config.num_layers + 1)
    assert macs_by_depth(model) == [closed_form(model, d) for d in depths]


def test_counting_does_not_change_the_model():
    model = dit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    macs_by_depth(model)
    assert len(model.transformer_blocks) == 6
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --- other families


def uvit(**options):
    """U-ViT-S/4, as published for CelebA."""
    sizes = {"sample_size": 64, "patch_size": 4, "in_channels": 3, "num_layers": 12}
    with torch.device("meta"):
        return UViTTransformer2DModel(
            **{**sizes, "num_attention_heads": 8, "attention_head_dim": 64, **options}
        )


@pytest.fixture(scope="module")
def uvit_s4():
    return uvit()


@pytest.mark.parametrize(
    ("name", "saving"),
    [("D1", 14.4), ("D2", 18.7), ("D3", 20.1), ("D4", 23.0), ("D5", 24.4), ("D6", 25.8)],
)
def test_uvit_saves_what_its_kept_projections_leave(uvit_s4, name, saving):
    schedule = Schedule.parse(name, 6, "uvit")
    assert 100 * ideal_saving(uvit_s4, schedule) == pytest.approx(saving, abs=0.06)
    assert schedule.ideal_saving() > 2 * ideal_saving(
        uvit_s4, schedule
    )  # the share of the decoder's blocks


def test_uvit_block_by_block(uvit_s4):
    costs, width, tokens = macs_by_depth(uvit_s4), 512, 257
    assert len(costs) == 7  # from no block to six
    assert costs[-1] / 1e9 == pytest.approx(12.211, abs=1e-3)
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert {b - a for a, b in pairwise(costs)} == {block}  # the projections run at every depth
    assert macs(uvit_s4, Compute(2)) == costs[2]


def test_blocks_that_differ_and_those_left_to_run():
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
    )
    costs = macs_by_depth(model)
    steps = [b - a for a, b in pairwise(costs)]
    assert steps[0] == steps[1] > steps[2]  # the last block does not update the text
    direct = [macs(model, Compute(depth)) for depth in (1, 2, 3, 4)]
    assert costs == direct
    schedule = Schedule.parse("uniform:2", 4)
    assert ideal_saving(model, schedule) == 1 - costs[1] / costs[3] != schedule.ideal_saving()


@pytest.mark.parametrize("kind", ["flux", "wan", "pixart", "sana", "hunyuan", "unet", "sdxl"])
def test_every_family_makes_up_its_own_call(kind):
    model = networks()[kind]
    backbone = backbone_of(model)
    costs = macs_by_depth(model)
    assert len(costs) == backbone.depth - backbone.least + 1
    assert all(a < b for a, b in pairwise(costs))
    middle = (backbone.least + backbone.depth) // 2
    assert macs(model, Compute(middle)) == costs[middle - backbone.least]
    assert cost_of(model)(Compute(backbone.depth)) == costs[-1]
    on_cpu = backbone.example(2, "cpu")
    assert len(next(iter(on_cpu.values()))) == 2
    if kind not in ("flux", "wan"):  # without a size in their configs they get large samples
        with torch.no_grad():
            assert len(model(**on_cpu).sample) == 2


def networks():
    import diffusers as d

    heads = {"num_attention_heads": 2, "attention_head_dim": 12}
    small = {"in_channels": 4, "out_channels": 4, **heads}
    unet = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    return {
        "flux": d.FluxTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        "wan": d.WanTransformer3DModel(
            **small, text_dim=10, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=64
        ),
        "pixart": d.PixArtTransformer2DModel(
            **heads,
            in_channels=4,
            out_channels=8,
            num_layers=3,
            cross_attention_dim=24,
            caption_channels=12,
            sample_size=8,
        ),
        "sana": d.SanaTransformer2DModel(
            **small,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=8,
            sample_size=8,
        ),
        "hunyuan": d.HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=8,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            text_len=3,
            text_len_t5=4,
        ),
        "unet": d.UNet2DModel(
            **unet,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        "sdxl": d.UNet2DConditionModel(
            **unet,
            attention_head_dim=2,
            cross_attention_dim=6,
            transformer_layers_per_block=(1, 2),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=32,
        ),
    }


def test_a_dit_saves_its_share_of_blocks_as_published():
    model = dit(num_layers=28)
    schedule = Schedule.parse("D4")
    levels = [t / 1000 for t in range(0, 1000, 20)]
    assert ideal_saving(model, schedule, levels) == schedule.ideal_saving(levels)
    assert ideal_saving(model, schedule) == pytest.approx(2 / 7)
    assert ideal_saving(model, Schedule.parse("full")) == 0


def test_merged_tokens_cost_less_attention():
    model = dit(sample_size=16)  # 64 tokens of which 16 join others
    plain, merged = (macs(model, Compute(6, merge)) for merge in (None, Merge(0.25)))
    width, tokens, kept = 32, 64, 48
    attention = 4 * (tokens - kept) * width**2 + 2 * (tokens**2 - kept**2) * width
    # every token is compared with the first one of each cell of 2 x 2; 16 join some of these
    matching = (48 + 16) * 16 * width
    assert merged == plain - 6 * (attention - matching)
    schedule = Schedule.parse("tome:0.25", 6)
    assert ideal_saving(model, schedule) == 1 - merged / plain
    assert cost_of(model)(Compute(6, Merge(0.25))) == merged


def test_a_cost_that_cannot_be_counted_is_the_share_of_blocks_with_a_warning():
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        in_channels=4,
        sample_size=16,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=12,
    )
    with pytest.raises(AccelkitError, match="Lumina2Transformer2DModel reads the values of its"):
        macs_by_depth(model)
    schedule = Schedule.parse("uniform:1", 3)
    alike = ideal_saving(model, schedule)
    assert alike == pytest.approx(2 / 3)
    model.layers[0].extra = torch.nn.Linear(1, 1)  # now they differ
    with pytest.warns(AccelkitWarning, match="as the share of counted blocks: Lumina2"):
        assert ideal_saving(model, schedule) == alike
