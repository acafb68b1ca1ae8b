"""Low-rank adapters (Hu et al. 2022) for models too large to train all weights of, by PEFT.

PEFT is needed to train an adapter; applying one is two matrix products
(:mod:`accelkit.artifact.adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accelkit.artifact.adapter import Adapter, refuse_peft, targets_of
from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError
from accelkit.schedule import Schedule

NAME = "accelkit"


def check(rank: int) -> None:
    """Raise AccelkitError if the rank is above 0 and PEFT is not installed."""
    if rank:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise AccelkitError(
                f"training adapters of rank {rank} needs PEFT: pip install 'accelkit[lora]', or "
                "train all weights with --lora-rank 0"
            ) from error


def check_reach(backbone: Backbone, schedule: Schedule) -> None:
    """Raise AccelkitError if a schedule's shallowest calls run no layer that has an adapter."""
    model, depth = backbone.model, min(schedule.depths)
    dropped = {id(block) for block in backbone.blocks[depth:]}
    outside = tuple(f"{name}." for name, m in model.named_modules() if id(m) in dropped)
    if all(name.startswith(outside) for name in targets_of(backbone)):
        raise AccelkitError(
            f"at depth {depth} this {type(model).__name__} runs no linear layer that can have an "
            "adapter; give a schedule that is deeper there, or train all weights with "
            "--lora-rank 0"
        )


def check_rank(backbone: Backbone, rank: int) -> None:
    """Raise AccelkitError for a rank above that of every layer that gets an adapter."""
    layers: list[Any] = [backbone.model.get_submodule(name) for name in targets_of(backbone)]
    widest = max(min(layer.in_features, layer.out_features) for layer in layers)
    if rank > widest:
        raise AccelkitError(
            f"adapters of rank {rank} are larger than the layers of this "
            f"{type(backbone.model).__name__}; give --lora-rank at most {widest}"
        )


@dataclass
class Injected:
    """Adapters that are being trained inside a model.

    Attributes:
        model: the model.
        rank: rank of each adapter.
        targets: full names of the linear layers that have one.
    """

    model: nn.Module
    rank: int
    targets: list[str]

    def adapter(self) -> Adapter:
        """Return the trained weights, copied to the CPU."""
        tensors = {}
        for name in self.targets:
            layer: Any = self.model.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)[NAME].weight
                tensors[f"{name}.{part}.weight"] = weight.detach().cpu().clone()
        return Adapter(self.rank, tensors)


@contextmanager
def injected(backbone: Backbone, rank: int, seed: int) -> Iterator[Injected]:
    """Give the linear layers of all blocks trainable adapters within the context.

    All other weights are frozen. Afterwards the model has its own layers again.

    Args:
        backbone: backbone of the model.
        rank: rank of the adapters, whose product is added unscaled (alpha = rank).
        seed: seed of their first factor; the second one starts at 0.

    Raises:
        AccelkitError: PEFT is missing, or the model already has adapters.
    """
    check(rank)
    from peft import LoraConfig, inject_adapter_in_model

    model = backbone.model
    refuse_peft(model)
    names = targets_of(backbone)
    originals = {name: model.get_submodule(name) for name in names}
    trainable = [p for p in model.parameters() if p.requires_grad]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    try:
        yield Injected(model, rank, names)
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)
        for parameter in trainable:
            parameter.requires_grad_()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(name, None)
