"""Fused forwards by the functions of accelkit_kernels, which run their references here."""

import pytest
import torch
from small_models import DiT, PixArt, UViT, mixed
from test_fused import relative, run

import accelkit_kernels
from accelkit.runtime.fused import ops

SEEN = {
    DiT: {"layernorm_modulate", "gated_residual", "gated_residual_layernorm_modulate",
          "bias_gelu_tanh", "exit_head"},
    PixArt: {"layernorm_modulate", "gated_residual", "gated_residual_layernorm_modulate",
             "bias_gelu_tanh", "exit_head"},
    UViT: {"layernorm_modulate", "gated_residual_layernorm_modulate", "skip_linear"},
}  # fmt: skip


class Counted:
    """The package of kernels, recording which functions are called."""

    def __init__(self):
        self.names = set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(accelkit_kernels, name)


@pytest.fixture
def kernels(monkeypatch):
    counted = Counted()
    monkeypatch.setattr(ops, "kernels_for", lambda x: counted)
    return counted


@pytest.mark.parametrize("family", SEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("timesteps", [[900, 100, 500, 100], [900, 900]])
def test_by_the_kernels(kernels, family, timesteps):
    model, call = family().make(), mixed(family(), timesteps)
    expected = run(model, call, family.schedule, "off")
    assert not kernels.names
    assert relative(run(model, call, family.schedule), expected) < 1e-6
    assert kernels.names == SEEN[family]


def test_bfloat16_by_the_kernels(kernels):
    family = DiT()
    call = mixed(family, [500, 900, 100])
    exact = run(family.make(), call, family.schedule, "off")
    narrow = call | {"hidden_states": call["hidden_states"].bfloat16()}
    output = run(family.make().bfloat16(), narrow, family.schedule)
    assert output.dtype == torch.bfloat16
    assert relative(output, exact) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gelu_of_a_linear_layer(dtype):
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*s, generator=draw).to(dtype) for s in ((2, 9, 8), (40, 8), (40,))
    )
    wide = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    exact = torch.nn.functional.gelu(wide, approximate="tanh")
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    assert relative(ops.linear_gelu_tanh(x, weight, bias), exact) < tolerance
    far = torch.tensor([[[-1e4, -40.0, 0.0, 40.0, 1e4]]], dtype=dtype)
    one = torch.eye(5, dtype=dtype)
    given = ops.linear_gelu_tanh(far, one, torch.zeros(5, dtype=dtype))
    assert given.flatten().tolist() == [0, 0, 0, 40, far[0, 0, 4].item()]


def test_the_cpu_has_no_kernels():
    assert ops.kernels_for(torch.zeros(1)) is None
