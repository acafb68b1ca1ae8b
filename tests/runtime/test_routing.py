"""Blocks and rows that run under a schedule, their outputs and their gradients."""

import json

import pytest
import torch
from plain import enable
from safetensors import safe_open
from safetensors.torch import save_file
from small_dit import DEPTH_OF, MIXED, SCHEDULE, by_hand, close, inputs, run, truncated
from torch.utils.checkpoint import checkpoint

from accelkit.errors import AccelkitError, AccelkitWarning
from accelkit.layouts.original import load_original
from accelkit.runtime.switch import disable, enabled_on
from accelkit.runtime.timesteps import place_in
from accelkit.schedule import Schedule

# --- outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 5, 6])
def test_an_exit_is_the_network_cut_there(dit, depth):
    call = inputs(MIXED)
    expected, full = run(truncated(dit, depth), *call), run(dit, *call)
    with enable(dit, f"uniform:{depth}"):
        assert torch.equal(run(dit, *call), expected)
    assert depth == 6 or (full - expected).abs().max() > 1e-2  # the blocks matter


def test_exits_are_the_original_implementations(golden, tmp_path):
    with safe_open(golden / "dit_public.safetensors", "pt") as file:
        recorded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        heads = json.loads(file.metadata()["config"])["num_heads"]
    weights = {key[7:]: value for key, value in recorded.items() if key.startswith("weight.")}
    save_file(weights, tmp_path / "dit.safetensors")
    model = load_original(tmp_path / "dit.safetensors", num_heads=heads)
    call = [recorded[f"input.{name}"] for name in "xty"]
    depths = [int(key[11:]) for key in recorded if key.startswith("output.exit")]
    assert depths
    for depth in depths:
        with enable(model, f"uniform:{depth}"):
            output = run(model, *call)
        torch.testing.assert_close(output, recorded[f"output.exit{depth}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("timestep", DEPTH_OF)
def test_the_noise_level_decides_the_depth(dit, timestep):
    call = inputs([timestep] * 3)
    expected = run(truncated(dit, DEPTH_OF[timestep]), *call)
    with enable(dit, SCHEDULE):
        assert torch.equal(run(dit, *call), expected)


def test_skipped_blocks_are_not_run_and_the_others_on_their_rows_only(dit):
    rows = [[] for _ in dit.transformer_blocks]
    for index, block in enumerate(dit.transformer_blocks):
        block.attn1.register_forward_hook(
            lambda module, args, output, index=index: rows[index].append(len(args[0]))
        )
    with enable(dit, SCHEDULE):
        run(dit, *inputs(MIXED))
        assert rows == [[4], [4], [3], [3], [2], [2]]
        run(dit, *inputs([900, 900]))
        assert rows == [[4, 2], [4, 2], [3], [3], [2], [2]]


@pytest.mark.parametrize(
    "timesteps",
    [
        MIXED,
        [100, 299, 300, 500, 600, 900],  # deepest first already
        [900, 600, 500, 300, 299, 100],
        [100, 900],
        [900, 100, 900],
        [500, 900, 500],  # nothing runs to the last block
        [600, 900, 900],
        [100],
    ],
)
def test_a_rows_output_does_not_depend_on_its_batch(dit, timesteps):
    call = inputs(timesteps)
    expected = by_hand(dit, *call)
    with enable(dit, SCHEDULE):
        output = run(dit, *call)
        close(output, expected)
        alone = zip(*(part.split(1) for part in call), strict=True)
        close(output, torch.cat([run(dit, *row) for row in alone]))


def test_random_batches(make_dit):
    dit = make_dit(layers=12, width=8)
    draw = torch.Generator().manual_seed(0)
    schedule = Schedule.parse("D6", 12)
    cut = {depth: truncated(dit, depth) for depth in schedule.depths}
    enable(dit, schedule)
    for size in (2, 7):
        latents, timesteps, labels = inputs(torch.randint(1000, (size,), generator=draw).tolist())
        rows = zip(latents.split(1), timesteps.split(1), labels.split(1), strict=True)
        alone = [run(cut[schedule.depth_at(t.item() / 1000)], x, t, y) for x, t, y in rows]
        close(run(dit, latents, timesteps, labels), torch.cat(alone))


@pytest.mark.parametrize("timesteps", [MIXED, [900] * 4])
def test_call_styles(dit, timesteps):
    latents, t, labels = inputs(timesteps)
    enable(dit, SCHEDULE)
    with torch.no_grad():
        named = dit(hidden_states=latents, timestep=t, class_labels=labels, return_dict=False)
        placed = dit(latents, t, labels, None, False)
        held = dit(latents, t, class_labels=labels)
    assert type(named) is type(placed) is tuple
    assert len(named) == len(placed) == 1
    assert torch.equal(named[0], placed[0])
    assert torch.equal(named[0], held.sample)
    assert type(held).__name__ == "Transformer2DModelOutput"


def test_one_timestep_or_label_for_all(dit):
    latents, timesteps, labels = inputs([900] * 4)
    one_label = by_hand(dit, latents, torch.tensor(MIXED), labels[:1].expand(4))
    expected = run(truncated(dit, 2), latents, timesteps, labels)
    with enable(dit, SCHEDULE):
        for shared in (timesteps[:1], timesteps[:1].expand(4), timesteps.float()):
            close(run(dit, latents, shared, labels), expected)
        close(run(dit, latents, torch.tensor(MIXED), labels[:1]), one_label)


def test_the_callers_tensors_do_not_change(dit):
    call = inputs(MIXED)
    before = [part.clone() for part in call]
    with enable(dit, SCHEDULE):
        run(dit, *call)
    assert all(map(torch.equal, call, before))


def test_place_in_finds_an_element_by_its_storage():
    whole = torch.arange(10)
    assert [place_in(step, whole) for step in whole] == list(range(10))
    assert place_in(whole[3][None].expand(5), whole) == 3
    even = whole[2::2]
    assert [place_in(whole[i], even) for i in (0, 1, 2, 3, 8)] == [None, None, 0, None, 3]
    assert place_in(whole[9], whole[:9]) is None  # beyond its end
    assert place_in(whole[3].clone(), whole) is None
    assert place_in(whole[3].int(), whole) is None
    assert place_in(whole.view(torch.int32)[6], whole) is None  # same bytes, other type
    assert place_in(whole[3], whole[:0]) is None


def test_compiled_wrappers_are_seen_through(dit):
    call = inputs(MIXED)
    expected = by_hand(dit, *call)
    wrapped = torch.compile(dit, backend="eager")
    with enable(wrapped, SCHEDULE) as state:
        assert state.backbone.model is dit
        assert enabled_on(dit) is enabled_on(wrapped) is state
        assert not vars(wrapped).get("_accelkit")
        close(run(dit, *call), expected)
    with pytest.warns(AccelkitWarning):
        disable(wrapped)


# --- gradients -------------------------------------------------------------------------------


def backward(model, *calls):
    """Gradients by name of the summed losses; all forwards are run before the backward."""
    model.zero_grad(set_to_none=True)
    losses = [
        model(x, timestep=t, class_labels=y).sample.square().sum(dim=(1, 2, 3)).sum()
        for x, t, y in calls
    ]
    sum(losses).backward()
    return gradients(model)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b):
    assert a.keys() == b.keys()
    largest = max(g.abs().max() for g in b.values())
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], atol=float(2e-6 * largest), rtol=1e-4)


def test_ragged_gradients_are_the_sum_of_the_rows(dit):
    call = inputs(MIXED)
    total = {}
    for x, t, y in zip(*(part.split(1) for part in call), strict=True):
        depth = DEPTH_OF[int(t)]
        for name, gradient in backward(truncated(dit, depth), (x, t, y)).items():
            total[name] = total.get(name, 0) + gradient
    with enable(dit, SCHEDULE):
        same_gradients(backward(dit, call), total)


def test_latents_get_their_own_rows_gradient(dit):
    latents, t, y = inputs(MIXED)

    def gradient(rows):
        x = latents[rows].clone().requires_grad_()
        dit(x, timestep=t[rows], class_labels=y[rows]).sample.square().sum().backward()
        return x.grad

    with enable(dit, SCHEDULE):
        close(gradient(slice(None)), torch.cat([gradient(slice(i, i + 1)) for i in range(4)]))


@pytest.mark.parametrize(
    "batches",
    [
        [MIXED],
        [[900, 900]],
        [[100, 500], [900, 900]],
        [[900, 900], [100, 100]],
        [MIXED, [500, 100, 900]],
    ],
)
def test_checkpointing_changes_no_gradient(dit, batches):
    calls = [inputs(batch, seed) for seed, batch in enumerate(batches)]
    enable(dit, SCHEDULE)
    expected = backward(dit, *calls)
    dit.enable_gradient_checkpointing()
    same_gradients(backward(dit, *calls), expected)


def test_checkpointing_survives_an_inference_call_before_the_backward(dit):
    enable(dit, SCHEDULE)
    call = inputs([100, 500])
    expected = backward(dit, call)
    dit.enable_gradient_checkpointing()
    dit.zero_grad(set_to_none=True)
    loss = dit(call[0], timestep=call[1], class_labels=call[2]).sample.square().sum()
    run(dit, *inputs([900, 900]))  # a validation step, say
    loss.backward()
    same_gradients(gradients(dit), expected)


def test_checkpointing_keeps_no_activation_after_the_backward(dit):
    state = enable(dit, SCHEDULE)
    dit.enable_gradient_checkpointing()
    backward(dit, inputs(MIXED))
    assert state._router.running is None
    assert not len(state._router._plans)


@pytest.mark.parametrize("batches", [[MIXED], [[900, 900], [100, 100]]])
def test_reentrant_checkpointing_raises_rather_than_lose_gradients(dit, batches):
    enable(dit, SCHEDULE)
    dit.enable_gradient_checkpointing(
        lambda module, *args: checkpoint(module.__call__, *args, use_reentrant=True)
    )
    calls = [(x.requires_grad_(), t, y) for x, t, y in map(inputs, batches)]
    with pytest.raises(AccelkitError, match="use_reentrant=False"):
        backward(dit, *calls)
