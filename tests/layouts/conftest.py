"""What the tests of original checkpoints have in common."""

import pytest
import torch
from original_layout import original_state
from safetensors.torch import save_file


@pytest.fixture
def small(tmp_path):
    """A checkpoint of random weights; returns a function that writes a changed copy of it."""

    def write(suffix=".safetensors", **changes):
        state = original_state()
        for name, value in changes.items():
            if value is None:
                del state[name]
            else:
                state[name] = value
        path = tmp_path / f"small{suffix}"
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save(state, path)
        return path

    return write
