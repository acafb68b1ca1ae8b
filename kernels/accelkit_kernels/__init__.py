"""Fused operations of diffusion transformers: a Triton kernel and a PyTorch reference each.

The package needs torch, and uses Triton if it is installed. Without Triton or without a GPU the
reference runs and nothing else changes.
"""

from accelkit_kernels._common import TRITON_PROBLEM
from accelkit_kernels.activations import (
    bias_geglu,
    bias_geglu_reference,
    bias_gelu_tanh,
    bias_gelu_tanh_reference,
    bias_swiglu,
    bias_swiglu_reference,
)
from accelkit_kernels.adaln import layernorm_modulate, layernorm_modulate_reference
from accelkit_kernels.angles import rotary_2d
from accelkit_kernels.exit import exit_head, exit_head_reference
from accelkit_kernels.gated import gated_residual, gated_residual_reference
from accelkit_kernels.rotary import qk_norm_rope, qk_norm_rope_reference
from accelkit_kernels.seam import (
    gated_residual_layernorm_modulate,
    gated_residual_layernorm_modulate_reference,
)
from accelkit_kernels.skip import skip_linear, skip_linear_reference
from accelkit_kernels.time_norm import td_norm, td_norm_reference

__all__ = [
    "TRITON_PROBLEM",
    "bias_geglu",
    "bias_geglu_reference",
    "bias_gelu_tanh",
    "bias_gelu_tanh_reference",
    "bias_swiglu",
    "bias_swiglu_reference",
    "exit_head",
    "exit_head_reference",
    "gated_residual",
    "gated_residual_layernorm_modulate",
    "gated_residual_layernorm_modulate_reference",
    "gated_residual_reference",
    "layernorm_modulate",
    "layernorm_modulate_reference",
    "qk_norm_rope",
    "qk_norm_rope_reference",
    "rotary_2d",
    "skip_linear",
    "skip_linear_reference",
    "td_norm",
    "td_norm_reference",
]
