"""A short training run: a DiT of three tiny blocks on eleven samples."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DiTTransformer2DModel

import accelkit
from accelkit.noise.processes import DiscreteProcess
from accelkit.schedule import Schedule
from accelkit.subject import Subject
from accelkit.train.config import TrainConfig
from accelkit.train.draws import draw
from accelkit.train.loop import Watch, make_accelerator, train
from accelkit.train.rundir import RunDirectory

LAYERS, CLASSES, SHAPE = 3, 10, (4, 4, 4)
FULL, RAGGED = "full", "3@0.3,2@0.6,1@1"
# Everything with a state is in use: warm-up, a falling rate, a ramped weight, label dropout.
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


def signalled(number, at):
    """Samples that send a signal to their own process when a step's batch is drawn."""

    def on_sample(call, x):
        if call == at:
            os.kill(os.getpid(), number)
        return x

    return Toy(on_sample)


def build(equal_embedders=True, channels=8):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=channels,
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


def fit(
    path, config=CONFIG, schedule=RAGGED, *, samples=None, model=None, scheduler=None, **options
):
    """Train in ``path``, resuming a run that is there; return the model."""
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
        subject = Subject.of(model, scheduler or DDIMScheduler())
        train(subject, parsed, samples, config, run, accelerator, watch)
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


def assert_close(one, other, atol=1e-4):
    """As close as two trainings that sum in different orders.

    That is 3e-6 at most with three sets of kernels, and 1e-4 is a thirtieth of one step of AdamW.
    A key's bias is left out: softmax ignores it, so its gradient is a rounding error of zero, which
    AdamW scales to whole steps in arbitrary directions.
    """
    for name, value in weights(one).items():
        if not name.endswith("to_k.bias"):
            torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=atol, msg=name)


def latest(path):
    return RunDirectory(path).latest()[0]


def drawn(config, step, process=None):
    return draw(
        config.seed,
        step,
        config.batch_size,
        size=11,
        shape=SHAPE,
        timesteps=(process or DiscreteProcess(DDIMScheduler().betas)).draw,
        dropout=config.label_dropout,
    )


def depths(timesteps, schedule=RAGGED):
    parsed = Schedule.parse(schedule, LAYERS)
    return [parsed.depth_at(t / 1000) for t in timesteps.tolist()]


def script(path, folder, **environment):
    """Start a test module as a separate process."""
    root = str(Path(accelkit.__file__).parents[1])
    known = {"PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, path, str(folder)],
        env={**os.environ, **known, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
