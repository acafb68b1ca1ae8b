"""Fused operations of diffusion transformers: a Triton kernel and a PyTorch reference each.

Depends on torch, and on Triton where there is one; without Triton or without a GPU the reference
runs and nothing else changes.
"""

from accelkit_kernels.adaln import layernorm_modulate, layernorm_modulate_reference

__all__ = ["layernorm_modulate", "layernorm_modulate_reference"]
