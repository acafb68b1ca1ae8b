"""Small models without a zero weight, so that every block and the exit show in the output."""

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

# What a machine or a CI service sets must not show: tables as wide as anywhere and without colour,
# and no launcher's settings but those of the test.
_DROPPED = {"FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "GITHUB_ACTIONS", "TTY_COMPATIBLE"}
_DROPPED |= {"TERMINAL_WIDTH", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
for _name in list(os.environ):
    if _name in _DROPPED or _name.startswith("ACCELERATE_"):
        del os.environ[_name]
os.environ["COLUMNS"] = "80"

# An example may take as long as a busy machine needs for it.
hypothesis.settings.register_profile(
    "anywhere", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("anywhere")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_dit() -> Callable:
    """Builds a DiT of 2x2 patches on (4, 8, 8) latents, learned variance, eval mode."""
    from diffusers import DiTTransformer2DModel

    def make(layers: int = 6, width: int = 32, seed: int = 0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DiTTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=width // 2,
                in_channels=4,
                out_channels=8,
                num_layers=layers,
                sample_size=8,
            )
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture
def dit(make_dit):
    """Six blocks."""
    return make_dit()


@pytest.fixture
def make_pipe(make_dit) -> Callable:
    """Builds a DiTPipeline around a small DiT and a small autoencoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    def make(layers: int = 6, seed: int = 0, scheduler=None):
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        pipe = DiTPipeline(make_dit(layers, seed=seed), vae, scheduler or DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(make_pipe):
    """Six blocks, DDIM with linear betas."""
    return make_pipe()


@pytest.fixture
def original(make_dit, tmp_path):
    """An original-layout file of six blocks, two heads each."""
    from accelkit.layouts.original import save_original

    model = make_dit()
    shared = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    save_original(model, tmp_path / "dit.safetensors", allow_inexact=True)
    return tmp_path / "dit.safetensors"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of outputs recorded from the original implementations."""
    folder = os.environ.get("ACCELKIT_GOLDEN")
    if not folder:
        pytest.skip("ACCELKIT_GOLDEN does not name the folder of recorded outputs")
    return Path(folder)
