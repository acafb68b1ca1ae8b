"""Multiply-accumulates and parameters against published figures, closed forms and other counters.

Everything is counted without weights.
"""

from itertools import pairwise
from math import prod

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from accelkit.backbones import backbone_of
from accelkit.backbones.example import Design, call
from accelkit.compute import Compute
from accelkit.cost import ideal_saving, macs, macs_by_depth, parameters_by_depth, parameters_of
from accelkit.jobs.published import names, publication
from accelkit.jobs.published_costs import counted, network_of
from accelkit.models import UViTTransformer2DModel
from accelkit.models.uvit import PUBLISHED
from accelkit.noise.axis import NoiseAxis
from accelkit.noise.vp_sde import VPSDEDPMSolverScheduler, VPSDEEulerMaruyamaScheduler
from accelkit.runtime.switch import enable
from accelkit.schedule import Schedule

COSTED = [name for name in names() if publication(name).cost is not None]


@pytest.mark.parametrize("name", COSTED)
def test_counted_columns(name):
    cost = publication(name).cost
    rows = counted(publication(name))
    assert len(rows) == len(cost.rows) > 0
    for row in rows:
        figures = set(row) & {"gmacs", "saving", "depths"}
        assert figures, row
        if "gmacs" in row:
            assert row["gmacs_counted"] == pytest.approx(row["gmacs"], rel=cost.tolerance)
        if "saving" in row:
            assert row["saving_counted"] == pytest.approx(row["saving"], abs=cost.tolerance)
        if "depths" in row:
            assert row["depths_counted"] == row["depths"]


def test_these_have_columns_to_count():
    assert set(COSTED) == {
        *("ase-table1", "ase-table1-uvit", "ase-table3", "ase-table4"),
        *("dvd-table1", "dvd-table2", "dvd-table3", "dvd-table-a1", "dvd-table-a2"),
    }


def test_the_layers_that_dvd_ran_are_told_by_its_flops():
    rows = [row for row in counted(publication("dvd-table-a2")) if "depth" in row]
    for row in rows:  # printed as those of 12 layers; no other number of 28 fits
        costs = {r["depth"]: r["gmacs_counted"] for r in rows}
        assert min(costs, key=lambda d: abs(costs[d] - row["gmacs"])) == row["depth"]
    per_layer = (rows[-1]["gmacs"] - rows[0]["gmacs"]) / 25
    assert per_layer == pytest.approx(4.0988, abs=1e-4)
    ours = (rows[-1]["gmacs_counted"] - rows[0]["gmacs_counted"]) / 25
    assert ours == pytest.approx(4.0848, abs=1e-4)


def test_reported_acceleration_by_50_ddim_steps_is_what_is_left_out():
    read = publication("ase-table3")
    model = network_of(read)
    steps = [round(i * 999 / 49) for i in range(50)]  # as the authors space them
    found = 0
    for figure in read.figures:
        if figure["steps"] == 50 and "saving" in figure:
            saving = ideal_saving(model, Schedule.parse(figure["method"]), steps)
            assert saving == pytest.approx(figure["saving"], abs=0.0055)  # of wall-clock time
            found += 1
    assert found == 4


def saved(method, sampler, steps):
    """The share of multiply-accumulates saved at the noise levels that a sampler visits."""
    made = {"em": VPSDEEulerMaruyamaScheduler, "dpm-fast": VPSDEDPMSolverScheduler}[sampler]()
    made.set_timesteps(steps)
    levels = NoiseAxis.of(made).levels(made.timesteps)
    schedule = Schedule.parse(method, 6, "uvit")
    return ideal_saving(network_of(publication("ase-table4")), schedule, levels)


def test_reported_accelerations_by_dpm_solver_follow_the_log_snr():
    assert saved("D1", "dpm-fast", 50) == pytest.approx(0.103, abs=5e-4)
    assert saved("D1", "dpm-fast", 25) == pytest.approx(0.112, abs=5e-4)
    figures = publication("ase-table4").figures
    reported = {(f["method"], f["sampler"], f["steps"]): f.get("saving") for f in figures}
    for (method, sampler, steps), saving in reported.items():
        if sampler == "dpm-fast" and saving is not None:
            # time saved of that by Euler-Maruyama, which visits noise levels evenly: it is 0.63 to
            # 0.80, and would be 1 if DPM-Solver's did
            ratio = saving / reported[method, "em", 1000]
            expected = saved(method, sampler, steps) / saved(method, "em", 1000)
            assert ratio == pytest.approx(expected, rel=0.1)


# parameters without the fixed positions, 10^9 multiply-accumulates: measured on the original code
DIT = {
    ("S", 2, 32): (32_865_056, 6.056),
    ("S", 4, 32): (32_920_448, 1.413),
    ("S", 8, 32): (33_142_016, 0.358),
    ("B", 2, 32): (130_315_808, 23.005),
    ("B", 4, 32): (130_426_496, 5.565),
    ("B", 8, 32): (130_869_248, 1.418),
    ("L", 2, 32): (457_840_672, 80.698),
    ("L", 4, 32): (457_988_224, 19.696),
    ("L", 8, 32): (458_578_432, 5.011),
    ("XL", 2, 32): (674_834_720, 118.621),
    ("XL", 4, 32): (675_000_704, 29.044),
    ("XL", 8, 32): (675_664_640, 7.392),
    ("XL", 2, 64): (674_834_720, 524.538),
}
SIZES = {"S": (12, 6, 64), "B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}


def dit(size, patch, side):
    layers, heads, head_dim = SIZES[size]
    with torch.device("meta"):
        return DiTTransformer2DModel(
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=4,
            out_channels=8,
            sample_size=side,
            patch_size=patch,
            norm_eps=1e-6,
        )


@pytest.mark.parametrize(("size", "patch", "side"), DIT)
def test_dit_of_every_size(size, patch, side):
    parameters, gmacs = DIT[size, patch, side]
    model = dit(size, patch, side)
    layers, heads, head_dim = SIZES[size]
    width, tokens = heads * head_dim, (side // patch) ** 2
    # the original embeds timestep and label once, diffusers in every block
    embedder = width**2 + 258 * width + 1001 * width
    counts, costs = parameters_by_depth(model), macs_by_depth(model)
    assert counts[-1] == parameters + (layers - 1) * embedder
    assert counts[-1] == sum(p.numel() for p in model.parameters())
    assert (costs[-1] - layers * (256 * width + width**2)) / 1e9 == pytest.approx(gmacs, abs=6e-4)
    ends = patch**2 * 4 * width + 256 * width + width**2 + 2 * width**2 + width * patch**2 * 8
    closed = tokens * (patch**2 * 4 + patch**2 * 8) * width + 256 * width + 3 * width**2
    block = 12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2
    assert costs[-1] == closed + layers * (block + 256 * width + width**2)
    ends += 1001 * width + width + 2 * width + 2 * width + patch**2 * 8
    for depth in (1, layers // 2):
        blocks = depth * (18 * width**2 + 15 * width) + (depth - 1) * embedder
        assert counts[depth - 1] == ends + blocks


UVIT = {
    "cifar10-s2": (44_255_328, 12.201),
    "celeba64-s4": (44_292_228, 12.211),
    "imagenet64-m4": (130_940_292, 35.236),
    "imagenet64-l4": (286_827_652, 76.473),
    "imagenet256-l2": (286_763_172, 76.456),
    "imagenet256-h2": (500_832_016, 133.197),
    "imagenet512-l4": (286_861_524, 76.482),
    "imagenet512-h4": (500_942_656, 133.225),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_released_uvit(name):
    parameters, gmacs = UVIT[name]
    with torch.device("meta"):
        model = UViTTransformer2DModel(**PUBLISHED[name])
    counts, costs = parameters_by_depth(model), macs_by_depth(model)
    assert (counts[-1], costs[-1] / 1e9) == (parameters, pytest.approx(gmacs, abs=6e-4))
    c = model.config
    width = c.num_attention_heads * c.attention_head_dim
    tokens = model.extras + (c.sample_size // c.patch_size) ** 2
    dropped = 12 * width**2 + 10 * width  # all but the projection of its skip
    assert counts == [counts[0] + i * dropped for i in range(c.num_layers // 2 + 1)]
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    assert costs == [costs[0] + i * block for i in range(c.num_layers // 2 + 1)]


def test_parameters_of_a_schedule():
    model = network_of(publication("ase-table4"))
    counts = parameters_by_depth(model)
    schedule = Schedule.parse("D4", 6, "uvit")  # 5, 4, 2, 2 and 1 of the decoder's blocks
    mean = schedule.mean(parameters_of(model))
    assert mean == pytest.approx(sum(counts[d] for d in (5, 4, 2, 2, 1)) / 5)
    assert max(parameters_of(model)(c) for c in schedule.computes) == counts[5] < counts[6]


def test_a_parameter_of_the_block_itself_is_not_read_where_it_is_skipped():
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            cross_attention_dim=16,
            caption_channels=6,
            sample_size=8,
        )
    counts = parameters_by_depth(model)
    block = sum(p.numel() for p in model.transformer_blocks[0].parameters())
    assert model.transformer_blocks[0].scale_shift_table.numel() == 6 * 16
    assert [b - a for a, b in pairwise(counts)] == [block, block]


# --- other counters


def by_shapes(model, depth):
    """Count a call at ``depth`` by the shapes that linear layers and convolutions are given."""
    backbone = backbone_of(model)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    total = 0

    def linear(module, inputs, output):
        nonlocal total
        total += output.numel() * module.in_features

    def convolution(module, inputs, output):
        nonlocal total
        total += output.numel() * module.in_channels * prod(module.kernel_size)

    def attention(module, inputs, output):
        nonlocal total
        total += 2 * output.shape[1] ** 2 * width  # scores and the sum by them

    attentions = {a for found in backbone.attentions() for a in found}
    with enable(model, Schedule.uniform(depth, backbone.depth), kernels="off"), torch.no_grad():
        for module in model.modules():
            for kind, count in ((nn.Linear, linear), (nn.Conv2d, convolution)):
                if isinstance(module, kind):
                    module.register_forward_hook(count)
            if module in attentions:
                module.register_forward_hook(attention)
        call(model, backbone.example(), "meta")
    return total


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_dit_by_the_shapes_of_its_layers(depth):
    model = dit("S", 2, 32)
    assert by_shapes(Design.of(model).twin(), depth) == macs(model, Compute(depth))


@pytest.mark.parametrize("depth", [0, 1, 5, 6])
def test_uvit_by_the_shapes_of_its_layers(depth):
    model = network_of(publication("ase-table4"))
    assert by_shapes(Design.of(model).twin(), depth) == macs(model, Compute(depth))


class Called(nn.Module):
    """A network as fvcore calls it: tensors in, a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model, self.names = model, None

    def forward(self, *tensors):
        return self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=False)[0]


@pytest.mark.parametrize("kind", ["dit", "uvit"])
@pytest.mark.filterwarnings("ignore")
def test_fvcore_counts_the_same(kind):
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore comes with the test extra")
    model = dit("S", 4, 16) if kind == "dit" else network_of(publication("ase-table4"))
    called = Called(model.to_empty(device="cpu").eval())
    given = backbone_of(called.model).example(1, "cpu")
    called.names = list(given)
    analysis = fvcore.FlopCountAnalysis(called, tuple(given.values()))
    analysis.set_op_handle(
        "aten::scaled_dot_product_attention",  # which it does not know: scores, and the sum by them
        lambda inputs, outputs: 2 * prod(inputs[0].type().sizes()) * inputs[1].type().sizes()[-2],
    )
    analysis.unsupported_ops_warnings(False).tracer_warnings("none")
    found = analysis.by_operator()
    ours = macs_by_depth(model)[-1]
    products = ("linear", "conv", "scaled_dot_product_attention", "addmm", "matmul")
    assert sum(found[name] for name in products) == ours
    elementwise = sum(found.values()) - ours  # norms and the sinusoids
    assert 0 < elementwise < 0.01 * ours
