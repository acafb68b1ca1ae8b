"""Fused forwards with unusual models, weights and calls."""

import threading

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.hooks import HookRegistry
from diffusers.training_utils import EMAModel
from small_models import DiT, PixArt, UViT, mixed
from test_fused import Doubling, relative, run

import accelkit
from accelkit.runtime.fused import ops
from accelkit.runtime.switch import disable, enable


def equal(model):
    """Make all embedders equal, as in every published model."""
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def agree(model, call, schedule=DiT.schedule):
    """Check that the enabled model agrees with its own modules, and return its output."""
    with torch.no_grad():
        output = model(**call).sample
    if model.__dict__.get("_accelkit"):
        disable(model)
    expected = run(model, call, schedule, "off")
    assert relative(output, expected) < 1e-6
    return output


# --- on the model itself -------------------------------------------------------------------------


def registered(model):
    HookRegistry.check_if_exists_or_initialize(model).register_hook(Doubled(), "doubled")


class Doubled(Doubling):
    def post_forward(self, module, output):
        return (output[0] * 2,)


def wrapped(model):
    own = model.forward
    model.forward = lambda *args, **kwargs: (own(*args, **kwargs | {"return_dict": False})[0] * 2,)


@pytest.mark.parametrize("change", [registered, wrapped])
def test_something_on_the_model_before(change):
    family = DiT()
    model = family.make()
    call = family.call(500) | {"return_dict": False}
    expected = run_tuple(model, call)
    change(model)
    with enable(model, family.schedule) as state, torch.no_grad():
        assert relative(model(**call)[0], 2 * expected) < 1e-6
        assert all("own modules" in path for path in state.paths())


def run_tuple(model, call):
    with enable(model, DiT.schedule, kernels="off"), torch.no_grad():
        return model(**call)[0]


def test_a_forward_put_into_the_class(monkeypatch):
    family = DiT()
    model, call = family.make(), family.call(500) | {"return_dict": False}
    expected = run_tuple(model, call)
    own = DiTTransformer2DModel.forward

    def patched(self, *args, **kwargs):
        return (own(self, *args, **kwargs)[0] * 2,)

    patched.__signature__ = __import__("inspect").signature(own)
    monkeypatch.setattr(DiTTransformer2DModel, "forward", patched)
    with enable(model, family.schedule) as state, torch.no_grad():
        assert relative(model(**call)[0], 2 * expected) < 1e-6
        assert "patched" in state.paths()[0]


def test_a_subclass():
    class Mine(DiTTransformer2DModel):
        def forward(self, hidden_states, timestep=None, class_labels=None, return_dict=True):
            made = super().forward(hidden_states, timestep, class_labels, return_dict=False)
            return (made[0] * 2,)

    family = DiT()
    model, call = family.make(), family.call(500) | {"return_dict": False}
    expected = run_tuple(model, call)
    model.__class__ = Mine
    with enable(model, family.schedule), torch.no_grad():
        assert relative(model(**call)[0], 2 * expected) < 1e-6


# --- weights ---------------------------------------------------------------------------------


def test_ema_weights_swapped_in_before_a_run():
    family = DiT()
    model, call = equal(family.make()), family.call(500)
    other = family.make()  # its embedders differ
    ema = EMAModel(other.parameters())
    enable(model, family.schedule)
    with torch.no_grad():
        model(**call)
    ema.copy_to(model.parameters())  # through .data
    agree(model, call | {"class_labels": torch.tensor([4, 4])})


def test_a_block_of_another_dtype_keeps_it():
    family = DiT()
    model, call = family.make(), family.call(500)
    model.transformer_blocks[1].to(torch.bfloat16)
    before = [p.dtype for p in model.parameters()]
    state = enable(model, family.schedule)
    assert "bfloat16" in state.paths()[1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**call)
    disable(model)
    assert [p.dtype for p in model.parameters()] == before


def test_weights_that_two_blocks_share():
    family = DiT()
    model, call = family.make(), family.call(100)
    blocks = model.transformer_blocks
    blocks[2].norm1.linear = blocks[1].norm1.linear
    state = enable(model, family.schedule)
    with torch.no_grad():
        model(**call)
        blocks[1].norm1.linear.weight.mul_(1.5)
        looks = state.fused.looks
        model(**call)
    assert state.fused.looks == looks
    assert state.paths()[2] == "own modules: it shares weights with another block"
    agree(model, call)


def test_a_custom_attention():
    class Mine(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states * 0.5

    for family in (DiT(), PixArt()):
        model = family.make()
        model.transformer_blocks[1].attn1 = Mine()
        enable(model, family.schedule)
        agree(model, family.call(500))


def test_a_hook_on_the_embedder_that_stands_for_all():
    family = DiT()
    model = equal(family.make())
    model.transformer_blocks[0].norm1.emb.register_forward_hook(lambda m, a, out: out * 3)
    enable(model, family.schedule)
    agree(model, family.call(500))


def test_a_last_norm_with_weights():
    family = DiT()
    model = family.make()
    model.norm_out = torch.nn.LayerNorm(16)
    torch.nn.init.constant_(model.norm_out.weight, 3.0)
    enable(model, family.schedule)
    agree(model, family.call(500))


def test_listing_the_paths_moves_no_weights():
    family = DiT()
    model, call = family.make(), family.call(500)
    state = enable(model, family.schedule)
    with torch.no_grad():
        model(**call)
        looks, places = state.fused.looks, [p.data_ptr() for p in model.parameters()]
        state.paths()
        model(**call)
    assert state.fused.looks == looks
    assert [p.data_ptr() for p in model.parameters()] == places


# --- calls -----------------------------------------------------------------------------------


def test_training_begun_after_the_first_call():
    family = PixArt()
    model, call = family.make(), family.call(500)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with enable(model, family.schedule), torch.no_grad():
        still = model(**call).sample
        model.train()
        torch.manual_seed(0)
        assert relative(model(**call).sample, still) > 1e-2
        model.eval()
        assert torch.equal(model(**call).sample, still)


@pytest.mark.parametrize(
    "write",
    [
        lambda labels, array: array.__setitem__(slice(None), 7),
        lambda labels, array: labels.data.fill_(7),
        lambda labels, array: labels.fill_(7),
    ],
    ids=["numpy", "data", "in place"],
)
def test_labels_written_to_between_steps(write):
    family = DiT()
    model, call = family.make(), family.call(500)
    array = call["class_labels"].numpy().copy()
    labels = torch.from_numpy(array)
    call |= {"class_labels": labels, "timestep": torch.tensor([500]).expand(2)}
    enable(model, family.schedule)
    with torch.no_grad():
        before = model(**call).sample
        model(**call)
    write(labels, array)
    assert relative(agree(model, call), before) > 1e-3


@pytest.mark.parametrize(
    ("family", "change"),
    [
        (DiT(), {"class_labels": torch.zeros(3, dtype=torch.long)}),
        (DiT(), {"class_labels": torch.zeros(8, dtype=torch.long)}),
        (DiT(), {"timestep": torch.tensor([500]).expand(3)}),
        (DiT(), {"nonsense": 1}),
        (UViT(), {"nonsense": 1}),
        (PixArt(), {"timestep": torch.tensor([500, 500, 500])}),
        (PixArt(), {"encoder_hidden_states": torch.randn(3, 5, 16)}),
    ],
)
def test_what_the_model_refuses_stays_refused(family, change):
    model, call = family.make(), family.call(500) | change
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        run(model, call, "full", "off")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        run(model, call, "full")


def test_two_threads():
    family = DiT()
    model = equal(family.make())
    calls = [mixed(family, [100] * n) for n in (2, 3)]
    expected = [run(model, call, "full", "off") for call in calls]
    enable(model, "full")
    wrong = []

    def work(place):
        with torch.no_grad():
            for _ in range(40):
                if relative(model(**calls[place]).sample, expected[place]) > 1e-5:
                    wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_threads_at_different_steps():
    family = DiT()
    model = equal(family.make())
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    labels, sample = torch.tensor([1, 1000]), family.call(0)["hidden_states"]
    calls = [
        {"hidden_states": sample, "timestep": t.expand(2), "class_labels": labels}
        for t in scheduler.timesteps
    ]
    expected = [run(model, call, "full", "off") for call in calls]
    enable(model, "full", scheduler=scheduler)
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(4):
                for call, right in zip(calls, expected, strict=True):
                    if relative(model(**call).sample, right) > 1e-5:
                        wrong.append(call["timestep"][0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_refused_call_has_no_effect_on_the_next():
    family = DiT()
    model, call = family.make(), family.call(500)
    enable(model, family.schedule)
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(**call | {"class_labels": torch.tensor([0.0, 1.0])})
    agree(model, call)


def test_a_block_made_in_inference_mode():
    family = DiT()
    model, call = family.make(), family.call(500)
    block = model.transformer_blocks[3]
    with torch.inference_mode():
        state = {name: value.clone() for name, value in block.state_dict().items()}
        block.load_state_dict(state, assign=True)
    enable(model, "full")
    agree(model, call, "full")


@pytest.mark.parametrize("given", [904.0, 804.0, 301.0])
def test_a_coarse_timestep_next_to_a_step(given):
    family = DiT()
    model, call = family.make(), family.call(500)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    call["timestep"] = torch.tensor([given], dtype=torch.bfloat16).expand(2)
    expected = run(model, call, "full", "off")
    with enable(model, "full", scheduler=scheduler), torch.no_grad():
        for _ in range(4):
            assert relative(model(**call).sample, expected) < 1e-6


def test_steps_written_to_in_place():
    family = DiT()
    model, call = family.make(), family.call(500)
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    with enable(model, "full", scheduler=scheduler), torch.no_grad():
        for t in scheduler.timesteps[:3]:
            model(**call | {"timestep": t.expand(2)})
        scheduler.timesteps -= 50
        outputs = [
            model(**call | {"timestep": t.expand(2)}).sample for t in scheduler.timesteps[:4]
        ]
    for t, output in zip(scheduler.timesteps, outputs, strict=False):
        assert relative(output, run(model, call | {"timestep": t.expand(2)}, "full", "off")) < 1e-6


def test_global_hooks_on_modules():
    family = DiT()
    model, call = family.make(), family.call(500)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        run(model, call, "full", "off")
        own = len(seen)
        run(model, call, "full")
    finally:
        handle.remove()
    assert len(seen) == 2 * own


def test_one_block_in_training_draws_its_labels():
    family = DiT()
    model = family.make()
    state = enable(model, "full")
    model.transformer_blocks[2].train()
    assert state.paths()[2] == "own modules: label dropout in training"


def test_the_meta_device_uses_the_own_modules():
    family = DiT()
    model = family.make().to("meta")
    call = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in family.call(500).items()}
    assert run(model, call, "full").shape == (2, 8, 8, 8)


def test_transforms_use_the_own_modules():
    family = DiT()
    model, call = family.make().requires_grad_(False), family.call(500)
    sample = call.pop("hidden_states")
    with enable(model, "full"), torch.no_grad():
        made = torch.func.vmap(lambda x: model(x, **call).sample)(sample[None])
        traced = torch.jit.trace(
            lambda x, y: model(x, **call | {"class_labels": y}).sample,
            (sample, call["class_labels"]),
            check_trace=False,
        )
        other = traced(sample, torch.tensor([9, 8]))
        assert relative(made[0], model(sample, **call).sample) < 1e-6
        call["class_labels"] = torch.tensor([9, 8])
        assert relative(other, model(sample, **call).sample) < 1e-6


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_sizes_than_dynamo_keeps_graphs_of_one_code():
    family = UViT()
    torch._dynamo.reset()
    model = family.make()
    state = enable(model, "0@1")
    accelkit.compile(model, "eager", limit=2)
    for size in range(1, 5):
        with torch.no_grad():
            output = model(**mixed(family, [100] * size)).sample
        assert output.shape[0] == size
    assert len(state.fused.graphs) == 2


def test_one_label_or_many_is_one_graph():
    family = DiT()
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    model = family.make()
    state = enable(model, "full")
    accelkit.compile(model, "eager")
    state.fused.graphs._make.__closure__[0].cell_contents = backend
    for labels in ([1, 1], [1, 2], [3, 3]):
        with torch.no_grad():
            model(**family.call(500) | {"class_labels": torch.tensor(labels)})
    assert len(graphs) == 1


def test_another_default_dtype_at_import_changes_nothing():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, generator=draw), torch.randn(40, 8, generator=draw)
    exact = torch.nn.functional.gelu(x @ weight.T, approximate="tanh")
    assert isinstance(ops._LINEAR, float)
    assert relative(ops.linear_gelu_tanh(x, weight, torch.zeros(40)), exact) < 1e-6
