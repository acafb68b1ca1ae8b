"""Fused operations of diffusion transformers: a Triton kernel and a PyTorch reference each.

Depends on torch, and on Triton where there is one; without Triton or without a GPU the reference
runs and nothing else changes.
"""

from accelkit_kernels.activations import (
    bias_geglu,
    bias_geglu_reference,
    bias_gelu_tanh,
    bias_gelu_tanh_reference,
    bias_swiglu,
    bias_swiglu_reference,
)
from accelkit_kernels.adaln import layernorm_modulate, layernorm_modulate_reference
from accelkit_kernels.gated import gated_residual, gated_residual_reference
from accelkit_kernels.seam import (
    gated_residual_layernorm_modulate,
    gated_residual_layernorm_modulate_reference,
)
from accelkit_kernels.time_norm import td_norm, td_norm_reference

__all__ = [
    "bias_geglu",
    "bias_geglu_reference",
    "bias_gelu_tanh",
    "bias_gelu_tanh_reference",
    "bias_swiglu",
    "bias_swiglu_reference",
    "gated_residual",
    "gated_residual_layernorm_modulate",
    "gated_residual_layernorm_modulate_reference",
    "gated_residual_reference",
    "layernorm_modulate",
    "layernorm_modulate_reference",
    "td_norm",
    "td_norm_reference",
]
