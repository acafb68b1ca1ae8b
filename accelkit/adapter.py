"""Low-rank adapters as an artifact holds them, and how they are added to a model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError


@dataclass(frozen=True)
class Adapter:
    """A low-rank change of linear layers: weight + B A (Hu et al. 2022, eq. 3, alpha = rank).

    Attributes:
        rank: of all products.
        tensors: ``NAME.lora_A.weight`` (rank, in) and ``NAME.lora_B.weight`` (out, rank) for each
            layer, as PEFT and diffusers name them.
    """

    rank: int
    tensors: dict[str, Tensor]

    @property
    def targets(self) -> list[str]:
        """Names of the layers."""
        return sorted({key.rsplit(".lora_", 1)[0] for key in self.tensors})

    def check(self, model: nn.Module) -> None:
        """Raise AccelkitError if ``model`` lacks a layer, or has it in another shape."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name in self.targets:
            down, up = (self.tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
            fits = down is not None and up is not None and len(down) == up.shape[1] == self.rank
            if not fits or shapes.get(f"{name}.weight") != (len(up), down.shape[1]):  # type: ignore[arg-type, union-attr]
                raise AccelkitError(f"the adapter does not fit this model: its {name} is another")

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Add the change to the weights of ``model``, computed in float32.

        Raises:
            AccelkitError: the model lacks a layer or has it in another shape, or carries adapters;
                it is as it was.
        """
        refuse_adapters(model)
        self.check(model)
        for name in self.targets:
            weight = model.get_parameter(f"{name}.weight")
            down, up = (
                self.tensors[f"{name}.lora_{part}.weight"].to(weight.device) for part in "AB"
            )
            weight.copy_(weight.float() + up.float() @ down.float())
        vars(model)[_ADDED] = True


_ADDED = "_accelkit_adapter"
"""Mark of a model to whose weights an adapter was added, which a second time would add it again."""


def refuse_adapters(model: nn.Module) -> None:
    """Raise AccelkitError for a model that has an adapter in its weights, or PEFT's around them."""
    refuse_peft(model)
    if _ADDED in vars(model):
        raise AccelkitError(
            f"this {type(model).__name__} has the adapter of an artifact in its weights, where it "
            "stays when a schedule is disabled; accelkit.enable switches a schedule on again, "
            "another adapter wants the base model opened anew"
        )


def refuse_peft(model: nn.Module) -> None:
    """Raise AccelkitError for a model whose weights PEFT has put adapters around."""
    names: Any = getattr(model, "peft_config", ())
    wrapped = any(name.endswith("base_layer") for name, _ in model.named_modules())
    if names or wrapped:
        which = ", ".join(names) or "deleted ones, whose layers are left"
        raise AccelkitError(
            f"this {type(model).__name__} carries PEFT adapters ({which}), under which its weights "
            "have other names; load them afterwards, or unload them first "
            "(pipe.unload_lora_weights; after pipe.fuse_lora it leaves them in the weights)"
        )


def forget_adapter(model: nn.Module) -> None:
    """Say that all weights of ``model`` were replaced, and an adapter in them with these."""
    vars(model).pop(_ADDED, None)


def targets_of(backbone: Backbone) -> list[str]:
    """Return the names of the linear layers that adapters are trained for.

    All of the attention and the feed-forward nets of every block, skip projections included; not
    those that make a block's modulation from timestep and condition.
    """
    blocks = {id(block): None for block in backbone.all_blocks}
    inside = [name for name, module in backbone.model.named_modules() if id(module) in blocks]
    return [
        f"{block}.{name}"
        for block in inside
        for name, module in backbone.model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear) and not any(m in name for m in ("norm", "time_emb"))
    ]
