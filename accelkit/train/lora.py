"""Low-rank adapters (Hu et al. 2022) for models too big to train whole, through PEFT.

PEFT is needed to train an adapter; applying one is two matrix products
(:mod:`accelkit.artifact.adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from accelkit.artifact.adapter import Adapter, refuse_peft, targets_of
from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError
from accelkit.schedule import Schedule

NAME = "accelkit"


def check(rank: int) -> None:
    """Raise AccelkitError if adapters are asked for and PEFT is not installed."""
    if rank:
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise AccelkitError(
                f"training adapters of rank {rank} needs PEFT: pip install 'accelkit[lora]', or "
                "train all weights with --lora-rank 0"
            ) from error


def check_reach(backbone: Backbone, schedule: Schedule) -> None:
    """Raise AccelkitError if the shallowest calls of a schedule run no layer with an adapter."""
    model, depth = backbone.model, min(schedule.depths)
    dropped = {id(block) for block in backbone.blocks[depth:]}
    outside = tuple(f"{name}." for name, m in model.named_modules() if id(m) in dropped)
    if all(name.startswith(outside) for name in targets_of(backbone)):
        raise AccelkitError(
            f"at depth {depth} this {type(model).__name__} runs no linear layer that an adapter "
            "could be trained for; give a schedule that is deeper there, or train all weights with "
            "--lora-rank 0"
        )


def check_rank(backbone: Backbone, rank: int) -> None:
    """Raise AccelkitError for a rank above that of every layer that an adapter is put on."""
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
        rank: of each.
        targets: full names of the linear layers beside which they lie.
    """

    model: nn.Module
    rank: int
    targets: list[str] = field(default_factory=list)

    def adapter(self) -> Adapter:
        """Return what they have learned, copied to the CPU."""
        tensors = {}
        for name in self.targets:
            layer: Any = self.model.get_submodule(name)
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)[NAME].weight
                tensors[f"{name}.{part}.weight"] = weight.detach().cpu().clone()
        return Adapter(self.rank, tensors)


@contextmanager
def injected(backbone: Backbone, rank: int, seed: int) -> Iterator[Injected]:
    """Put trainable adapters beside the linear layers of all blocks, as long as it is entered.

    Everything else is frozen. Afterwards the model is as it was, adapters gone.

    Args:
        backbone: of the model.
        rank: of the adapters, whose product is added unscaled (alpha = rank).
        seed: of their first factor; the second one starts at 0.

    Raises:
        AccelkitError: PEFT is missing, or has put adapters on the model already.
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
