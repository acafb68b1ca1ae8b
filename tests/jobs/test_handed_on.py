"""A fine-tuning asks once which network, family and noise axis it works with, and hands them on."""

import sys

import numpy as np
import pytest
from PIL import Image

from accelkit.backbones import registry
from accelkit.bench.protocol import Protocol
from accelkit.jobs.finetune import finetune
from accelkit.jobs.reporter import Silent
from accelkit.jobs.settings import Run, Source
from accelkit.noise.axis import NoiseAxis
from accelkit.train.config import TrainConfig

MOST = 10


@pytest.fixture
def asked(monkeypatch):
    """How often each question was asked, wherever its function was imported."""
    counts = {"denoiser_of": 0, "backbone_of": 0, "NoiseAxis.of": 0}

    def counted(name, real):
        def ask(*args):
            counts[name] += 1
            return real(*args)

        return ask

    for name in ("denoiser_of", "backbone_of"):
        real = getattr(registry, name)
        for path, module in list(sys.modules.items()):
            if path.startswith("accelkit.") and vars(module).get(name) is real:
                monkeypatch.setattr(module, name, counted(name, real))
    of = counted("NoiseAxis.of", NoiseAxis.of)
    monkeypatch.setattr(NoiseAxis, "of", staticmethod(of))
    return counts


def test_a_fine_tuning_asks_few_times(asked, model, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "data" / name / "0.png")
    plan = Protocol(
        methods="full;6@0.5,3@1;tome:0.5;pab;steps",
        samplers=("ddim:4",),
        images=2,
        batch_size=2,
        rounds=1,
        timing_batch_size=2,
        throughput=(),
    )
    config = TrainConfig(steps=2, batch_size=2)
    source = Source(str(model), str(tmp_path / "data"))
    results = finetune(source, "6@0.5,3@1", config, plan, Run(tmp_path / "run"), Silent())
    methods = [(row["method"], row["weights"]) for row in results["rows"] if not row["skipped"]]
    assert methods == [
        ("full", "original"),
        ("6@0.5,3@1", "original"),
        ("tome:0.5", "original"),
        ("pab", "original"),
        ("steps:3", "original"),
        ("6@0.5,3@1", "tuned"),
    ]
    assert min(asked.values()) > 0
    assert max(asked.values()) <= MOST, asked
