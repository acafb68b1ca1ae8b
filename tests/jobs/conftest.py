"""What tests of several jobs share: a cache, a small model in a directory, and no plots."""

import pytest
import torch

from accelkit.bench import harness
from accelkit.jobs import bench


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leaves out the report, which takes longer than a small comparison, and most repetitions."""
    real = harness.time_runs

    def time_runs(runs, size, rounds, *rest, **named):
        return real(
            runs, size, rounds if rounds < 7 else 1, *rest, **named
        )  # 7 unless a test says so

    monkeypatch.setattr(bench, "write_report", lambda *args: None)
    monkeypatch.setattr(harness, "DEPTH_ROUNDS", 1)
    monkeypatch.setattr(harness, "time_runs", time_runs)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The directory of a pipeline around six blocks; tests do not write to it."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    folder = tmp_path_factory.mktemp("models") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=6,
            sample_size=8,
        )
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    DiTPipeline(network, vae, DDIMScheduler()).save_pretrained(folder)
    return folder
