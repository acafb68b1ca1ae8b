"""Schedules on U-ViT: which blocks run, what a skipped one still runs, and that no trace stays."""

import copy
import io
import json
import pickle

import pytest
import torch
from diffusers import DDIMScheduler
from plain import enable
from safetensors import safe_open
from safetensors.torch import save_file

from accelkit.backbones import backbone_of
from accelkit.layouts.original import load_original
from accelkit.models import PUBLISHED, UViTTransformer2DModel
from accelkit.runtime.switch import disable, enabled_on

SCHEDULE = "4@0.3,2@0.6,0@1"  # of the four decoder blocks of `uvit`
DEPTH_OF = {100: 4, 299: 4, 300: 2, 500: 2, 600: 0, 900: 0}
MIXED = [900, 100, 500, 100]  # depths 0, 4, 2, 4


def make(layers=8, seed=0, **changes):
    """Make a class-conditional U-ViT of 2x2 patches on (4, 8, 8) latents, with no zero weight."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UViTTransformer2DModel(
            **{
                "sample_size": 8,
                "in_channels": 4,
                "num_layers": layers,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_classes": 11,
                "null_class": 10,
                **changes,
            }
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def uvit():
    return make()


def inputs(timesteps, seed=1):
    """Return latents, timesteps and labels, with a row for each timestep."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(timesteps), 4, 8, 8, generator=draw)
    labels = torch.randint(11, (len(timesteps),), generator=draw)
    return latents, torch.tensor(timesteps), labels


@torch.no_grad()
def run(model, latents, timesteps, labels):
    return model(latents, timesteps, class_labels=labels).sample


class OnlySkip(torch.nn.Module):
    """The part of a dropped decoder block that still runs."""

    def __init__(self, block):
        super().__init__()
        self.linear = block.skip_linear

    def forward(self, x, skip):
        weight_x, weight_skip = self.linear.weight.chunk(2, dim=1)
        return x @ weight_x.T + skip @ weight_skip.T + self.linear.bias


def truncated(model, depth):
    """Return the network with all decoder blocks after the first ``depth`` cut down by hand."""
    short = copy.deepcopy(model)
    for index in range(depth, len(short.out_blocks)):
        short.out_blocks[index] = OnlySkip(short.out_blocks[index])
    return short


def by_hand(model, latents, timesteps, labels):
    """Run every row alone through the network cut to its depth."""
    cut = {depth: truncated(model, depth) for depth in set(DEPTH_OF.values())}
    rows = zip(latents.split(1), timesteps.split(1), labels.split(1), strict=True)
    return torch.cat([run(cut[DEPTH_OF[int(t)]], x, t, y) for x, t, y in rows])


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def traces(model):
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for name, module in model.named_modules()
    }


def calls_of(model):
    """Record the number of rows that every block's attention runs on."""
    ran = {}
    blocks = [*model.in_blocks, model.mid_block, *model.out_blocks]
    for index, block in enumerate(blocks):
        block.attn.register_forward_hook(
            lambda module, args, output, index=index: ran.setdefault(index, []).append(len(args[0]))
        )
    return ran


# --- what runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uncond", "class"])
def test_exits_are_the_original_implementations(golden, tmp_path, name):
    with safe_open(golden / f"uvit_public_{name}.safetensors", "pt") as file:
        recorded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        heads = json.loads(file.metadata()["config"])["num_heads"]
    weights = {key[7:]: value for key, value in recorded.items() if key.startswith("weight.")}
    save_file(weights, tmp_path / "uvit.safetensors")
    model = load_original(tmp_path / "uvit.safetensors", num_heads=heads)
    call = [recorded.get(f"input.{key}") for key in "xty"]
    depths = [int(key[14:]) for key in recorded if key.startswith("output.decoder")]
    assert 0 in depths
    assert len(depths) >= 4
    for depth in depths:
        expected = recorded[f"output.decoder{depth}"]
        with enable(model, f"uniform:{depth}"):
            folded = run(model, *call)
            chained = model(*call).sample.detach()
        torch.testing.assert_close(folded, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(chained, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_an_exit_is_the_network_cut_there(uvit, depth):
    call = inputs(MIXED)
    expected, full = run(truncated(uvit, depth), *call), run(uvit, *call)
    with enable(uvit, f"uniform:{depth}"):
        close(run(uvit, *call), expected)
    assert depth == 4 or (full - expected).abs().max() > 1e-2  # the blocks matter


def test_full_hooks_nothing_and_changes_no_bit(uvit):
    call = inputs(MIXED)
    output = run(uvit, *call)
    with enable(uvit, "full"):
        assert not any("_diffusers_hook" in vars(m) for m in uvit.modules())
        assert torch.equal(run(uvit, *call), output)


def test_where_a_schedule_runs_every_block_no_bit_changes(uvit):
    call = inputs([100, 200, 50])
    output = run(uvit, *call)
    with enable(uvit, SCHEDULE):
        assert torch.equal(run(uvit, *call), output)


def test_only_decoder_blocks_are_dropped_the_last_ones_first(uvit):
    ran = calls_of(uvit)
    with enable(uvit, SCHEDULE):
        run(uvit, *inputs([500, 500]))
    assert ran == {index: [2] for index in range(7)}  # 4 encoder blocks, middle, 2 of the decoder


@pytest.mark.parametrize(
    "timesteps",
    [
        MIXED,
        [100, 299, 300, 500, 600, 900],  # deepest first already
        [900, 600, 500, 300, 299, 100],
        [500, 900, 500],  # nothing runs to the last block
        [100],
    ],
)
def test_a_rows_output_does_not_depend_on_its_batch(uvit, timesteps):
    call = inputs(timesteps)
    expected = by_hand(uvit, *call)
    with enable(uvit, SCHEDULE):
        output = run(uvit, *call)
        close(output, expected)
        alone = zip(*(part.split(1) for part in call), strict=True)
        close(output, torch.cat([run(uvit, *row) for row in alone]))


def test_a_mixed_batch_runs_each_block_on_its_rows_only(uvit):
    ran = calls_of(uvit)
    with enable(uvit, SCHEDULE):
        run(uvit, *inputs(MIXED))
    assert [ran[index] for index in range(9)] == [[4]] * 5 + [[3], [3], [2], [2]]


def test_without_classes():
    model = make(num_classes=None, null_class=None)
    latents, timesteps, _ = inputs(MIXED)
    expected = by_hand_plain(model, latents, timesteps)
    with enable(model, SCHEDULE), torch.no_grad():
        close(model(latents, timesteps).sample, expected)


@torch.no_grad()
def by_hand_plain(model, latents, timesteps):
    rows = zip(latents.split(1), timesteps.split(1), strict=True)
    return torch.cat([truncated(model, DEPTH_OF[int(t)])(x, t).sample for x, t in rows])


def test_call_styles(uvit):
    latents, t, y = inputs(MIXED)
    enable(uvit, SCHEDULE)
    with torch.no_grad():
        named = uvit(sample=latents, timestep=t, class_labels=y, return_dict=False)
        placed = uvit(latents, t, y, False)
        held = uvit(latents, t, class_labels=y)
    assert type(named) is type(placed) is tuple
    assert torch.equal(named[0], placed[0])
    assert torch.equal(named[0], held.sample)


def test_one_timestep_or_label_for_all(uvit):
    latents, _, labels = inputs(MIXED)
    one = labels[:1]
    expected = by_hand(uvit, latents, torch.tensor(MIXED), one.expand(4))
    with enable(uvit, SCHEDULE):
        close(run(uvit, latents, torch.tensor(MIXED), one), expected)
        for shared in (torch.tensor(900), torch.tensor([900]), 900):
            close(run(uvit, latents, shared, labels), run(truncated(uvit, 0), latents, 900, labels))


def test_the_noise_level_of_the_networks_own_time():
    for name in ("celeba64-s4", "imagenet256-h2"):
        config = {k: v for k, v in PUBLISHED[name].items() if k.startswith("timestep_")}
        model = make(**config)
        backbone = backbone_of(model)
        index = torch.tensor([0, 299, 300, 599, 600, 999])
        given = backbone.model_timestep(index)
        assert not torch.equal(given, index.float())
        with enable(model, SCHEDULE, scheduler=DDIMScheduler()):
            ran = calls_of(model)
            latents, _, labels = inputs([0] * 6)
            run(model, latents, given, labels)
        assert [ran[i] for i in range(5, 9)] == [[4], [4], [2], [2]]
        assert ran[0] == [6]


# --- gradients -------------------------------------------------------------------------------


def backward(model, *calls):
    model.zero_grad(set_to_none=True)
    sum(model(x, t, y).sample.square().sum() for x, t, y in calls).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b):
    assert a.keys() == b.keys()
    largest = max(g.abs().max() for g in b.values())
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], atol=float(5e-6 * largest), rtol=1e-3)


@pytest.mark.parametrize("timesteps", [MIXED, [900, 900], [500, 500, 500]])
def test_gradients_are_those_of_the_cut_networks(uvit, timesteps):
    call = inputs(timesteps)
    total = {}
    for x, t, y in zip(*(part.split(1) for part in call), strict=True):
        short = truncated(uvit, DEPTH_OF[int(t)])
        for name, gradient in backward(short, (x, t, y)).items():
            key = name.replace(".linear.", ".skip_linear.")
            total[key] = total.get(key, 0) + gradient
    with enable(uvit, SCHEDULE):
        same_gradients(backward(uvit, call), total)


@pytest.mark.parametrize("batches", [[MIXED], [[900, 900]], [[100, 500], [900, 900]]])
def test_checkpointing_changes_no_gradient(uvit, batches):
    calls = [inputs(batch, seed) for seed, batch in enumerate(batches)]
    enable(uvit, SCHEDULE)
    expected = backward(uvit, *calls)
    uvit.enable_gradient_checkpointing()
    same_gradients(backward(uvit, *calls), expected)


def test_the_time_embedder_can_be_frozen():
    model = make(mlp_time_embed=True)
    with backbone_of(model).training(freeze_time=True):
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"time_embed.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert all(p.requires_grad for p in model.parameters())


def test_initialisation_for_training_follows_the_seed(uvit):
    backbone_of(uvit).initialize(3)
    first = copy.deepcopy(uvit.state_dict())
    backbone_of(uvit).initialize(3)
    assert all(torch.equal(v, first[k]) for k, v in uvit.state_dict().items())
    backbone_of(uvit).initialize(4)
    assert not torch.equal(uvit.pos_embed, first["pos_embed"])


# --- copies, compile, the others -------------------------------------------------------------


def test_disabled_again_nothing_is_left(uvit):
    call = inputs(MIXED)
    before, keys, output = traces(uvit), list(uvit.state_dict()), run(uvit, *call)
    enable(uvit, SCHEDULE)
    assert list(uvit.state_dict()) == keys
    assert not torch.equal(run(uvit, *call), output)
    run(uvit, *inputs([900]))
    disable(uvit)
    assert traces(uvit) == before
    assert torch.equal(run(uvit, *call), output)


@pytest.mark.parametrize("timesteps", [MIXED, [900, 900]])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_runs_its_own_weights_under_its_own_schedule(uvit, timesteps, way):
    call = inputs(timesteps)
    enable(uvit, SCHEDULE)
    output = run(uvit, *call)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(uvit, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(uvit) if way == "deepcopy" else pickle.loads(pickle.dumps(uvit))
    assert enabled_on(twin) is not enabled_on(uvit)
    with torch.no_grad():
        for parameter in uvit.parameters():
            parameter.zero_()
    assert not run(uvit, *call).any()
    assert torch.equal(run(twin, *call), output)


def test_a_model_in_use_saves_as_a_plain_one(uvit, tmp_path):
    call = inputs(MIXED)
    plain = run(uvit, *call)
    enable(uvit, SCHEDULE)
    run(uvit, *inputs([900]))
    uvit.save_pretrained(tmp_path)
    loaded = UViTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, *call), plain)


SMALL = "2@0.3,1@0.6,0@1"  # of two decoder blocks


class Graphs(list):
    """A backend that records the graphs it compiles."""

    def __call__(self, graph, _):
        self.append(graph)
        return graph.forward

    @property
    def products(self):
        return [str(graph.code).count("linear(") for graph in self]


@pytest.fixture
def compiled():
    """Return a small U-ViT, the same compiled whole, and its graphs."""
    torch._dynamo.reset()
    model, graphs = make(4), Graphs()
    enable(model, SMALL)
    return model, torch.compile(model, backend=graphs, fullgraph=True), graphs


def test_compiled_there_is_one_graph_for_each_depth(compiled):
    _, wrapped, graphs = compiled
    calls = {depth: inputs([t, t]) for depth, t in ((2, 100), (1, 500), (0, 900))}
    for _ in range(2):
        for depth, call in calls.items():
            close(run(wrapped, *call), run(truncated(make(4), depth), *call))
    # 4 a block, 1 for each skip, and the prediction; a run of two skips is one product
    assert graphs.products == [5 * 4 + 2 + 1, 4 * 4 + 2 + 1, 3 * 4 + 1 + 1]


def test_compiled_new_weights_are_seen(compiled):
    model, wrapped, graphs = compiled
    call, plain = inputs([900, 900]), make(4)
    for factor in (1, 2, 3):
        for net in (model, plain):
            with torch.no_grad():
                net.out_blocks[1].skip_linear.weight.mul_(factor)
        close(run(wrapped, *call), run(truncated(plain, 0), *call))
    assert len(graphs) == 1


def test_compiled_with_gradients(compiled):
    model, wrapped, graphs = compiled
    call = inputs([900, 900])
    expected = backward(model, call)
    model.zero_grad(set_to_none=True)
    wrapped(*call).sample.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    same_gradients(found, expected)
    assert graphs.products == [3 * 4 + 2 + 1]  # the chain


def test_adapters_on_the_skips_count():
    peft = pytest.importorskip("peft")
    call = inputs([900, 900])
    model = make()
    enable(model, SCHEDULE)
    before = run(model, *call)
    config = peft.LoraConfig(r=2, target_modules=["skip_linear"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, model)
    output = run(model, *call)
    disable(model)
    for block in model.out_blocks:
        linear = block.skip_linear
        block.skip_linear = torch.nn.Linear(64, 32)
        with torch.no_grad():
            block.skip_linear.weight.copy_(
                linear.base_layer.weight + linear.get_delta_weight("default")
            )
            block.skip_linear.bias.copy_(linear.base_layer.bias)
    close(output, run(truncated(model, 0), *call))
    assert (output - before).abs().max() > 1e-3


def test_weights_stored_in_another_dtype_than_they_run_in(uvit):
    call = inputs([900, 900])
    expected = run(truncated(uvit, 0), *call)
    uvit.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert uvit.out_blocks[0].skip_linear.weight.dtype == torch.bfloat16
    enable(uvit, SCHEDULE)
    for _ in range(2):
        torch.testing.assert_close(run(uvit, *call), expected, atol=3e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(uvit, dtype):
    latents, t, y = inputs([900, 900])
    expected = run(truncated(uvit, 0), latents, t, y)
    uvit.to(dtype)
    with enable(uvit, SCHEDULE):
        output = run(uvit, latents.to(dtype), t, y)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=5e-2, rtol=0)


def test_tokens_before_the_map_are_never_merged(uvit):
    backbone = backbone_of(uvit)
    latents, _, _ = inputs(MIXED)
    assert backbone.tokens_protected == 2
    assert backbone_of(make(num_classes=None, null_class=None)).tokens_protected == 1
    assert backbone.grid({"sample": latents}) == (4, 4)
    assert len(backbone.attentions()) == len(backbone.all_blocks) == 9
    assert backbone.all_blocks[5] is uvit.out_blocks[0]
