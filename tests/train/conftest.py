"""Fixtures of the training loop's tests."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from toy_run import fit


@pytest.fixture
def one_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
    yield
    for state in (GradientState, AcceleratorState, PartialState):
        state._reset_state()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The model after eight steps; read it, do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        return fit(tmp_path_factory.mktemp("runs") / "whole")
