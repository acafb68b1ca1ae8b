"""The training loop on a DiT of five tiny blocks: what it computes, and that it can be killed.

Run as a script it is one of the processes of the tests that need more than one.
"""

import copy
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

import accelkit
from accelkit.backbones import DiT
from accelkit.errors import AccelkitError, Stopped
from accelkit.noise import REFERENCE
from accelkit.schedule import Schedule
from accelkit.switch import enabled_on
from accelkit.train.config import TrainConfig
from accelkit.train.draws import draw
from accelkit.train.forward import DiscreteProcess
from accelkit.train.loop import Watch, make_accelerator, train
from accelkit.train.objectives import denoising_loss
from accelkit.train.rundir import RunDirectory

LAYERS, CLASSES, SHAPE = 5, 10, (4, 4, 4)
FULL, RAGGED = "full", "5@0.2,4@0.4,3@0.6,2@0.8,1@1"
# Everything that has a state is in use: warm-up, a falling rate, a ramped weight, label dropout.
CONFIG = TrainConfig(
    steps=8,
    batch_size=8,
    learning_rate=3e-3,
    lr_schedule="cosine",
    lr_warmup_steps=2,
    weight_decay=0.01,
    ema_decay=0.3,
    label_dropout=0.3,
    loss_weight="ramp",
    loss_weight_until=0.5,
    freeze_time_embedder=False,
    seed=5,
)
SHORT = replace(CONFIG, steps=3)


class Toy:
    """Eleven samples of four values each, so that batches of eight straddle epochs."""

    shape = SHAPE

    def __init__(self, on_sample=lambda call, x: x, labelled=True):
        rng = torch.Generator().manual_seed(1)
        self.mean = torch.randn(11, *SHAPE, generator=rng)
        self.labels = torch.arange(11) % CLASSES if labelled else None
        self.on_sample, self.calls = on_sample, 0

    def __len__(self):
        return len(self.mean)

    def sample(self, indices, noise):
        self.calls += 1
        return self.on_sample(self.calls, self.mean[indices] + 0.1 * noise)


def build(equal_embedders=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=LAYERS,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=CLASSES,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    if equal_embedders:
        first, *others = (block.norm1.emb for block in model.transformer_blocks)
        for other in others:
            other.load_state_dict(first.state_dict())
    return model.eval()


def fit(path, config=CONFIG, schedule=RAGGED, *, samples=None, model=None, **options):
    """Train in ``path``, going on where it was left if it holds a run; return the model."""
    model = build() if model is None else model
    watch = Watch(**options)
    run = RunDirectory(path)
    AcceleratorState._reset_state()  # another test may have used another precision
    try:
        accelerator = make_accelerator(config)
        if accelerator.is_main_process:
            run.open({}, resume=(path / "run.json").exists(), overwrite=False, free=frozenset())
        parsed = Schedule.parse(schedule, LAYERS)
        samples = samples or Toy()
        train(model, DDIMScheduler(), parsed, samples, config, run, accelerator, watch)
    finally:
        run.close()
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    """Bit for bit."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(one, other, atol=2e-5):
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=atol, msg=name)


def latest(path):
    return RunDirectory(path).latest()[0]


def drawn(config, step):
    return draw(
        config.seed,
        step,
        config.batch_size,
        size=11,
        shape=SHAPE,
        timesteps=DiscreteProcess(DDIMScheduler().betas).draw,
        dropout=config.label_dropout,
    )


def depths(timesteps, schedule=RAGGED):
    parsed = Schedule.parse(schedule, LAYERS)
    return [parsed.depth_at(t / 1000) for t in timesteps.tolist()]


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
    yield
    for state in (GradientState, AcceleratorState, PartialState):
        state._reset_state()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What eight steps end with; read it, do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        return fit(tmp_path_factory.mktemp("runs") / "whole")


def script(task, folder, **environment):
    root = str(Path(accelkit.__file__).parents[1])
    known = {"PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, task, str(folder)],
        env={**os.environ, **known, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


# What a step computes


def by_hand(config, schedule):
    """The loop in its plainest form: samples one by one through a network cut to their depth."""
    model, process = build(), DiscreteProcess(DDIMScheduler().betas)
    blocks = model.transformer_blocks
    for block in blocks:
        block.norm1.emb = blocks[0].norm1.emb
    blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0
    student = dict(model.named_parameters())
    teacher = {name: value.detach().clone() for name, value in student.items()}
    optimizer = torch.optim.AdamW(student.values(), weight_decay=config.weight_decay)
    samples, losses = Toy(), []
    for step in range(config.steps):
        batch = drawn(config, step)
        x0 = samples.sample(batch.rows, batch.posterior)
        xt = DDIMScheduler().add_noise(x0, batch.noise, batch.timestep)
        labels = torch.where(batch.drop, CLASSES, samples.labels[batch.rows])
        outputs = []
        for row, depth in enumerate(depths(batch.timestep, schedule)):
            model.transformer_blocks = blocks[:depth]
            one = slice(row, row + 1)
            outputs.append(model(xt[one], batch.timestep[one], labels[one]).sample)
        output = torch.cat(outputs)
        loss = denoising_loss(process, output, x0, batch.noise, xt, batch.timestep)
        levels = torch.tensor(REFERENCE.levels(batch.timestep))
        loss = (loss * config.weight_at(step, levels)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.values(), config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = config.learning_rate * (0.5 if step else 1.0)
        optimizer.step()
        losses.append(loss.item())
        decay = min((1 + step) / (10 + step), config.ema_decay) if step else 0
        for name, value in student.items():
            teacher[name].lerp_(value.detach(), 1 - decay)
    model.transformer_blocks = blocks
    for name, value in student.items():
        value.data.copy_(teacher[name])
    return model, losses


@pytest.mark.parametrize("schedule", [FULL, RAGGED])
def test_against_a_plain_loop(tmp_path, schedule):
    # two steps of a cosine: the whole rate, then half of it
    config = replace(CONFIG, steps=2, lr_warmup_steps=0, loss_weight_until=1.0, max_grad_norm=0.1)
    losses = []
    model = fit(tmp_path, config, schedule, on_step=lambda p: losses.append(p.loss))
    expected, expected_losses = by_hand(config, schedule)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert_close(model, expected)


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
    for index, block in enumerate(model.transformer_blocks):  # a block's own hook runs if it is
        block.attn1.register_forward_pre_hook(  # skipped, its attention's does not
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
        {"gradient_checkpointing": True},
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


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("schedule", [FULL, RAGGED])
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
    """The first training leaves nothing that the second one trips over, precision included."""
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
    table = "transformer_blocks.3.norm1.emb.class_embedder.embedding_table.weight"
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


# Ending early and going on


def test_killed_between_checkpoints(tmp_path, uninterrupted):
    process = script("kill", tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert latest(tmp_path) == 3
    steps = []
    model = fit(tmp_path, on_step=lambda progress: steps.append(progress.step))
    assert steps == [4, 5, 6, 7, 8]
    assert_same(model, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(tmp_path, uninterrupted, number):
    steps = []

    def on_step(progress):
        steps.append(progress.step)
        if progress.step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=number.name) as caught:
        fit(tmp_path, on_step=on_step, checkpoint_every=3)
    assert caught.value.signum == number
    assert f"after step {steps[-1]};" in str(caught.value)
    assert latest(tmp_path) == steps[-1] <= 5  # the step under way is finished
    assert_same(fit(tmp_path), uninterrupted)


def test_signal_while_a_checkpoint_is_written(tmp_path, uninterrupted, monkeypatch):
    rename = Path.rename

    def interrupted(self, target):
        if target.name.startswith("step-"):
            os.kill(os.getpid(), signal.SIGTERM)
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(Stopped, match="after step 4"):
            fit(tmp_path, checkpoint_every=3)
    assert_same(fit(tmp_path), uninterrupted)


def test_signal_in_the_last_step(tmp_path, uninterrupted):
    """There is nothing left to go on with: the run ends well."""

    def on_step(progress):
        if progress.step == CONFIG.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    assert_same(fit(tmp_path, on_step=on_step), uninterrupted)
    assert latest(tmp_path) == CONFIG.steps


def test_a_finished_run_gives_its_weights_again(tmp_path, uninterrupted):
    fit(tmp_path)
    steps = []
    assert_same(fit(tmp_path, on_step=steps.append), uninterrupted)
    assert steps == []


def test_not_finite(tmp_path, uninterrupted):
    poisoned = Toy(lambda call, x: x * torch.nan if call >= 5 else x)
    with pytest.raises(AccelkitError, match="nan at step 5; the checkpoint of step 3") as caught:
        fit(tmp_path, samples=poisoned, checkpoint_every=3)
    assert "\n" not in str(caught.value)
    assert_same(fit(tmp_path), uninterrupted)


def test_not_finite_before_any_checkpoint(tmp_path):
    with pytest.raises(AccelkitError, match="nan at step 1; no checkpoint was reached"):
        fit(tmp_path, samples=Toy(lambda call, x: x * torch.nan))
    assert RunDirectory(tmp_path).latest() is None


def test_full_disk(tmp_path, uninterrupted, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def on_step(progress):
        if progress.step == 5:
            monkeypatch.setattr(torch, "save", full)

    with pytest.raises(AccelkitError, match="no room to write") as caught:
        fit(tmp_path, on_step=on_step, checkpoint_every=3)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert latest(tmp_path) == 3
    assert_same(fit(tmp_path), uninterrupted)


def halve(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def rename_a_weight(path):
    tensors = load_file(path)
    tensors["another.weight"] = tensors.pop("proj_out_2.weight")
    save_file(tensors, path)


def test_broken_checkpoint(tmp_path, uninterrupted):
    """Whichever of its files is broken or missing, one line says what to do, and doing it helps."""
    fit(tmp_path, checkpoint_every=3, keep=0)
    newest = RunDirectory(tmp_path).latest()[1]
    ways = [(entry, halve) for entry in newest.iterdir() if "random_states" not in entry.name]
    ways += [(entry, Path.unlink) for entry, _ in ways]
    ways.append((newest / "model.safetensors", rename_a_weight))
    for entry, spoil in ways:
        content = entry.read_bytes()
        spoil(entry)
        with pytest.raises(AccelkitError, match=r"cannot read the checkpoint .*8: ") as caught:
            fit(tmp_path)
        assert str(caught.value).endswith("; remove it to go on from the one before")
        assert "\n" not in str(caught.value)
        entry.write_bytes(content)
    shutil.rmtree(newest)
    assert_same(fit(tmp_path), uninterrupted)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_runs_no_code(tmp_path):
    fit(tmp_path / "run", SHORT)
    pickles = [
        entry
        for entry in RunDirectory(tmp_path / "run").latest()[1].iterdir()
        if entry.suffix != ".safetensors"
    ]
    assert pickles
    for entry in pickles:
        content = entry.read_bytes()
        torch.save(Bomb(tmp_path / f"{entry.name} exploded"), entry)
        with suppress(AccelkitError):
            fit(tmp_path / "run", SHORT)
        entry.write_bytes(content)
    assert list(tmp_path.glob("*exploded")) == []


def test_in_another_thread(tmp_path, uninterrupted):
    """Where signals cannot be caught."""
    models = []
    thread = threading.Thread(target=lambda: models.append(fit(tmp_path)))
    thread.start()
    thread.join(timeout=60)
    assert_same(models[0], uninterrupted)


# Several processes

PAIR = replace(CONFIG, batch_size=4, steps=6)
SHARED = {
    "plain": PAIR,
    "accumulated": replace(PAIR, gradient_accumulation=2),
    "recomputed": replace(PAIR, gradient_checkpointing=True),
    "adapters": replace(PAIR, lora_rank=2),
    "stopped": PAIR,
}


def one_has_no_deep_sample(config, schedule=RAGGED):
    """Steps in which the deepest block is run by one of two processes only."""
    shares = [
        [LAYERS in depths(drawn(config, step).part(rank, 2).timestep) for rank in (0, 1)]
        for step in range(config.steps)
    ]
    return sum(one != other for one, other in shares)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have trained what SHARED names."""
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        script("share", folder, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_do_what_one_does(pair, tmp_path, name):
    assert one_has_no_deep_sample(SHARED[name]) >= 2
    one, other = build(), build()
    for rank, model in enumerate((one, other)):
        model.load_state_dict(torch.load(pair / f"{name}-{rank}.pt", weights_only=True))
    assert_same(one, other)
    assert_close(one, fit(tmp_path, replace(PAIR, lora_rank=SHARED[name].lora_rank)))
    theirs, ours = (
        load_file(RunDirectory(run).latest()[1] / "model.safetensors")
        for run in (pair / name, tmp_path)
    )
    assert theirs.keys() == ours.keys()


def test_a_signal_to_one_process_stops_both_at_the_same_step(pair):
    steps = [(pair / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert steps == ["3", "3"]


def test_what_two_processes_began_one_can_finish(pair, tmp_path):
    shutil.copytree(pair / "stopped", tmp_path / "run")
    shutil.rmtree(RunDirectory(tmp_path / "run").latest()[1])
    assert latest(tmp_path / "run") == 3
    assert_close(fit(tmp_path / "run", PAIR), fit(tmp_path / "alone", PAIR))


def killed(folder):
    def on_step(progress):
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    fit(folder, checkpoint_every=3, on_step=on_step)


def shared(folder):
    """Train as one of two processes; in the last run the second one gets a signal midway."""
    rank = os.environ["RANK"]

    def on_sample(call, x):
        if rank == "1" and call == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    for name, config in SHARED.items():
        if name == "stopped":
            try:
                fit(folder / name, config, samples=Toy(on_sample))
            except Stopped:
                torch.distributed.barrier()
                (folder / f"{name}-{rank}.txt").write_text(str(latest(folder / name)))
            torch.distributed.barrier()
        torch.save(weights(fit(folder / name, config)), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kill": killed, "share": shared}[sys.argv[1]](Path(sys.argv[2]))
