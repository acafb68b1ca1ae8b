"""Low-rank adapters of an artifact, and their addition to a model's weights."""

from __future__ import annotations

import math
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
        rank: the rank of every product.
        tensors: ``NAME.lora_A.weight`` (rank, in) and ``NAME.lora_B.weight`` (out, rank) for each
            layer, as PEFT and diffusers name them.
    """

    rank: int
    tensors: dict[str, Tensor]

    @property
    def targets(self) -> list[str]:
        """Names of the adapted layers."""
        return sorted({key.rsplit(".lora_", 1)[0] for key in self.tensors})

    def check(self, model: nn.Module) -> None:
        """Raise AccelkitError if the adapter is empty or its layers are not those of ``model``."""
        if not self.tensors:
            raise AccelkitError("the adapter has no tensors; give it as it was saved")
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name in self.targets:
            down, up = (self.tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
            fits = down is not None and up is not None and down.ndim == up.ndim == 2
            fits = fits and len(down) == up.shape[1] == self.rank  # type: ignore[arg-type, union-attr]
            if not fits or shapes.get(f"{name}.weight") != (len(up), down.shape[1]):  # type: ignore[arg-type, union-attr]
                raise AccelkitError(f"the adapter does not fit this model: its {name} is another")

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Add the change to the weights of ``model``, computed in float32.

        Raises:
            AccelkitError: the model lacks a layer or has it in another shape; it is unchanged.
        """
        self.check(model)
        for name in self.targets:
            weight = model.get_parameter(f"{name}.weight")
            down, up = (factor.to(weight.device).float() for factor in self._factors(name))
            weight.copy_(weight.float() + up @ down)

    def about(self, model: nn.Module) -> dict[str, Any]:
        """Return plain data about this adapter, which the weights of ``model`` contain.

        Its ``probes`` are a few of the weights before the change, for :meth:`check_base`. Each
        probed row has two: the weight that the change affects most, which identifies a model that
        has the change already, and the one that it affects least, which identifies other weights.
        """
        return {"rank": self.rank, "targets": self.targets, "probes": self._probes(model)}

    def _probes(self, model: nn.Module) -> list[dict[str, Any]]:
        found = []
        for name in self.targets[:: math.ceil(len(self.targets) / _PROBED)]:
            weight = model.get_parameter(f"{name}.weight").detach()
            row = int(self._factors(name)[1].float().norm(dim=1).argmax())
            change = self._change(name, row)
            before = weight[row].double().cpu() - change
            share = (change / before).abs().nan_to_num(0)
            dtype = str(weight.dtype).removeprefix("torch.")
            for column in (int(share.argmax()), int(share.argmin())):
                place = {"layer": name, "row": row, "column": column}
                found.append({**place, "weight": float(before[column]), "dtype": dtype})
        return found

    def check_base(self, model: nn.Module, probes: list[dict[str, Any]]) -> None:
        """Raise AccelkitError unless ``model`` has the weights that the adapter was trained for."""
        kind = type(model).__name__
        try:
            compared = [self._compared(model, probe) for probe in probes]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise AccelkitError(
                f"the adapter's probes are not of weights that this {kind} has "
                f"({type(error).__name__}: {error}); give the adapter as it was saved"
            ) from error
        before, after = ([pair[i] for pair in compared] for i in (0, 1))
        if all(after) and not all(before):
            raise AccelkitError(
                f"this {kind} has the adapter in its weights already, where it stays when the "
                "schedule is disabled; accelkit.enable switches the schedule on again"
            )
        if not all(before):
            raise AccelkitError(
                f"the adapter was trained for other weights than this {kind} has, such as those of "
                f"{probes[before.index(False)]['layer']}; open its base model again"
            )

    def _compared(self, model: nn.Module, probe: dict[str, Any]) -> tuple[bool, bool]:
        """Return whether a probed weight is as before the change, and as after it."""
        weight = model.get_parameter(f"{probe['layer']}.weight").detach()
        found = float(weight[probe["row"], probe["column"]])
        change = float(self._change(probe["layer"], probe["row"])[probe["column"]])
        dtypes = (weight.dtype, getattr(torch, probe["dtype"]))
        rounding = sum(torch.finfo(dtype).eps for dtype in dtypes)
        # the change may have been computed at lower precision, such as TF32
        near = 2 * rounding * (abs(probe["weight"]) + abs(change)) + 0.01 * abs(change)
        off = found - probe["weight"]
        return abs(off) <= near, abs(off - change) <= near

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a layer."""
        down, up = (self.tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        return down, up

    def _change(self, name: str, row: int) -> Tensor:
        """Return a row of a layer's B A, float64."""
        down, up = self._factors(name)
        return up[row].double() @ down.double()


_PROBED = 16
"""Most layers to probe."""


def refuse_peft(model: nn.Module) -> None:
    """Raise AccelkitError for a model whose layers are wrapped in PEFT adapters."""
    names: Any = getattr(model, "peft_config", ())
    wrapped = any(name.endswith("base_layer") for name, _ in model.named_modules())
    if names or wrapped:
        which = ", ".join(names) or "deleted ones, whose layers are left"
        raise AccelkitError(
            f"this {type(model).__name__} carries PEFT adapters ({which}), under which its weights "
            "have other names; load them afterwards, or unload them first "
            "(pipe.unload_lora_weights; after pipe.fuse_lora it leaves them in the weights)"
        )


def targets_of(backbone: Backbone) -> list[str]:
    """Return the names of the linear layers that adapters are trained for.

    These are the layers of attention, feed-forward nets and skip projections in every block, but
    not those that compute a block's modulation from timestep and condition.
    """
    blocks = {id(block): None for block in backbone.all_blocks}
    inside = [name for name, module in backbone.model.named_modules() if id(module) in blocks]
    return [
        f"{block}.{name}"
        for block in inside
        for name, module in backbone.model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear) and not any(m in name for m in ("norm", "time_emb"))
    ]
