"""The training loop on a DiT of tiny blocks: a step's computation, and what stays behind."""

import copy
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch
from by_hand import train_by_hand
from toy_run import (
    CLASSES,
    CONFIG,
    FULL,
    LAYERS,
    RAGGED,
    SHORT,
    Toy,
    assert_close,
    assert_same,
    build,
    depths,
    drawn,
    fit,
    latest,
    weights,
)

from accelkit.backbones import DiT
from accelkit.errors import AccelkitError, Stopped
from accelkit.runtime.switch import enabled_on
from accelkit.train.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("one_cpu")


# What a step computes


@pytest.mark.parametrize("schedule", [FULL, RAGGED])
def test_against_a_plain_loop(tmp_path, schedule):
    # two steps of a cosine: the whole rate, then half of it
    config = replace(CONFIG, steps=2, lr_warmup_steps=0, loss_weight_until=1.0, max_grad_norm=0.1)
    seen = []
    model = fit(tmp_path, config, schedule, on_step=seen.append)
    expected = train_by_hand(config, schedule)
    assert [p.loss for p in seen] == pytest.approx(expected.losses, rel=1e-5)
    assert [p.grad_norm for p in seen] == pytest.approx(expected.norms, rel=1e-5)
    assert [p.learning_rate for p in seen] == pytest.approx(expected.rates[1:])
    assert_close(model, expected.model)


def test_what_a_step_reports(tmp_path):
    seen = []
    fit(tmp_path, replace(CONFIG, steps=4, lr_schedule="constant"), on_step=seen.append)
    assert [progress.step for progress in seen] == [1, 2, 3, 4]
    rates = [progress.learning_rate for progress in seen]
    assert rates == pytest.approx([1.5e-3, 3e-3, 3e-3, 3e-3])
    assert all(progress.grad_norm > 0 for progress in seen)
    assert all(progress.samples_per_second > 0 for progress in seen)


def test_no_block_runs_rows_whose_output_is_thrown_away(tmp_path):
    model, rows = build(), [[] for _ in range(LAYERS)]
    for index, block in enumerate(model.transformer_blocks):  # the hook of a skipped block runs,
        block.attn1.register_forward_pre_hook(  # that of its attention does not
            lambda module, args, index=index: rows[index].append(len(args[0]))
        )
    fit(tmp_path, model=model)
    steps = [depths(drawn(CONFIG, step).timestep) for step in range(CONFIG.steps)]
    assert sum(map(sum, rows)) == sum(map(sum, steps))
    for index in range(LAYERS):
        assert rows[index] == [n for s in steps if (n := sum(d > index for d in s))]


def test_labels_are_dropped_once_per_sample(tmp_path):
    """Not once per block, as diffusers' copies of the embedder would."""
    config, model, calls = replace(CONFIG, steps=1), build(), []
    embedder = model.transformer_blocks[0].norm1.emb.class_embedder
    embedder.register_forward_hook(
        lambda module, args, output: calls.append(
            (args[0].tolist(), torch.equal(output, module.embedding_table.weight[args[0]]))
        )
    )
    fit(tmp_path, config, model=model)
    batch = drawn(config, 0)
    assert 0 < batch.drop.sum() < 8
    expected = torch.where(batch.drop, CLASSES, batch.rows % CLASSES)
    order = sorted(range(8), key=lambda row: -depths(batch.timestep)[row])
    labels = expected[order].tolist()
    assert len(calls) == LAYERS + 1  # the final layer asks block 0's embedder again
    for seen, undropped in calls:
        assert seen == labels[: len(seen)]
        assert undropped
    assert calls[-1][0] == labels


def test_samples_without_labels_train_the_null_class(tmp_path):
    before, model = build(), fit(tmp_path, SHORT, samples=Toy(labelled=False))
    tables = [
        m.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
        for m in (before, model)
    ]
    decayed = (tables[0] - tables[1]).abs().amax(1)
    assert decayed[:CLASSES].max() < 1e-4
    assert decayed[CLASSES] > 1e-3


def test_frozen_time_embedder(tmp_path):
    before, model = weights(build()), fit(tmp_path, replace(SHORT, freeze_time_embedder=True))
    changed = {n for n, value in weights(model).items() if not torch.equal(value, before[n])}
    assert changed == {name for name in before if "timestep_embedder" not in name}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_teacher_is_what_is_kept(tmp_path):
    """The first step's weights, then a moving average with decay (1 + n) / (10 + n), capped."""
    model, students = build(), []
    fit(tmp_path, model=model, on_step=lambda progress: students.append(weights(model)))
    teacher = students[0]
    for n, student in enumerate(students[1:], start=1):
        decay = min((1 + n) / (10 + n), 0.3)
        teacher = {name: decay * teacher[name] + (1 - decay) * student[name] for name in teacher}
    for name, value in weights(model).items():
        torch.testing.assert_close(value, teacher[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.proj_out_2.weight, students[-1]["proj_out_2.weight"])


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_accumulation": 2},
        {"gradient_accumulation": 4, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_ways_to_save_memory_change_nothing(tmp_path, uninterrupted, change):
    model = fit(tmp_path, replace(CONFIG, **change))
    assert_close(model, uninterrupted)
    assert not model.gradient_checkpointing


def test_bfloat16_leaves_float32_weights(tmp_path, uninterrupted):
    model = fit(tmp_path, replace(CONFIG, mixed_precision="bf16"))
    assert {value.dtype for value in weights(model).values()} == {torch.float32}
    assert_close(model, uninterrupted, atol=5e-2)
    assert not torch.equal(model.proj_out_2.weight, uninterrupted.proj_out_2.weight)


@pytest.mark.parametrize(("precision", "schedule"), [("no", RAGGED), ("bf16", FULL)])
@pytest.mark.parametrize("ends", ["well", "stopped", "diverged"])
def test_nothing_is_left_on_the_model(tmp_path, precision, schedule, ends):
    def on_sample(call, x):
        if ends == "stopped" and call == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return x * torch.nan if ends == "diverged" and call == 2 else x

    model = build()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    config = replace(SHORT, mixed_precision=precision)
    try:
        fit(tmp_path, config, schedule, model=model, samples=Toy(on_sample))
    except (Stopped, AccelkitError):
        assert ends != "well"
    else:
        assert ends == "well"
        assert not model.training
    left = {
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute in set(vars(module)) - before[name]
    }
    assert left == set()
    assert enabled_on(model) is None
    blocks = model.transformer_blocks
    assert {block.norm1.emb.class_embedder.dropout_prob for block in blocks} == {0.1}
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_the_same_model_trained_again(tmp_path):
    """A second training is not affected by the first, not even by its precision."""
    model = fit(tmp_path / "first", SHORT)
    twin = build()
    twin.load_state_dict(model.state_dict())
    again = replace(SHORT, mixed_precision="bf16")
    assert_same(
        fit(tmp_path / "second", again, model=model), fit(tmp_path / "twin", again, model=twin)
    )


def test_embedders_stay_equal_and_are_separate_again(uninterrupted):
    before = build()
    assert DiT(uninterrupted).embedders_equal
    embedders = [block.norm1.emb for block in uninterrupted.transformer_blocks]
    pointers = [p.data_ptr() for embedder in embedders for p in embedder.parameters()]
    assert len(set(pointers)) == len(pointers) == LAYERS * 5
    table = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    assert not torch.equal(weights(before)[table], weights(uninterrupted)[table])
    assert len(list(uninterrupted.parameters())) == len(list(before.parameters()))
    before.load_state_dict(uninterrupted.state_dict(), strict=True)


def test_embedders_that_differ_are_trained_apart(tmp_path):
    before = build(equal_embedders=False)
    model = fit(tmp_path, SHORT, model=copy.deepcopy(before))
    tables = [
        [b.norm1.emb.class_embedder.embedding_table.weight for b in m.transformer_blocks]
        for m in (before, model)
    ]
    assert all(not torch.equal(old, new) for old, new in zip(*tables, strict=True))
    assert all((old - new).abs().max() < 0.02 for old, new in zip(*tables, strict=True))
    assert not DiT(model).embedders_equal


@pytest.mark.parametrize("parts", [3, 16])
def test_a_batch_that_cannot_be_shared(tmp_path, parts):
    with pytest.raises(AccelkitError, match=f"batch of 8.*give a multiple of {parts}"):
        fit(tmp_path, replace(CONFIG, gradient_accumulation=parts))


def test_previews_see_the_teacher_and_change_nothing(tmp_path, uninterrupted):
    seen = []

    def preview(step, model):
        seen.append((step, model.training, weights(model)))
        torch.randn(100)

    model = fit(tmp_path, preview=preview, preview_every=4)
    assert [(step, training) for step, training, _ in seen] == [(4, False), (8, False)]
    assert_same(model, uninterrupted)
    assert all(torch.equal(value, seen[1][2][name]) for name, value in weights(model).items())


def test_saving_does_not_warn_of_shared_embedders(tmp_path, caplog):
    fit(tmp_path, SHORT)
    assert latest(tmp_path) == SHORT.steps
    state = torch.load(RunDirectory(tmp_path).latest()[1] / "optimizer.bin", weights_only=True)
    assert [group["fused"] for group in state["param_groups"]] == [True]  # one pass over weights
    assert "hared tensor" not in caplog.text
    logging.getLogger("accelerate.utils.other").warning("Removed shared tensor of another")
    assert "Removed shared tensor of another" in caplog.text
