"""Which backbone a model has: families by class name, and the network that a pipeline calls."""

from __future__ import annotations

from typing import Any

from torch import nn

from accelkit.backbones.base import Backbone
from accelkit.errors import AccelkitError

_families: dict[str, type[Backbone]] = {}


def register_backbone(model: str | type[nn.Module], backbone: type[Backbone]) -> None:
    """Let models of a class, or of one derived from it, be read by ``backbone``.

    A family whose blocks follow one another says which they are and what runs after them::

        import accelkit

        class MyBackbone(accelkit.Backbone):
            family = "mine"
            batched = ("hidden_states", "encoder_hidden_states")  # of the model's call
            block_batched = ("encoder_hidden_states", "temb")  # of a block's call

            @property
            def blocks(self):
                return self.model.transformer_blocks

            @property
            def exit(self):
                return self.model.norm_out

        accelkit.register_backbone(MyTransformer2DModel, MyBackbone)
        accelkit.enable(pipe, "D4")

    Blocks that return several states name them in ``states``, in the order in which they return
    them, and say in ``skipped`` what a skipped one returns where not all return the same. A model
    that is given another number than the scheduler's timestep says so by ``timestep_scale``; blocks
    that leave something to do when skipped, such as joining a long skip, set ``sequential = False``
    and do it in ``skipped``. Without ``block_batched`` samples of different depths are run in one
    pass for each depth.

    A diffusers model of a class that nobody registered is looked at in a trial call without weights
    (:class:`accelkit.backbones.generic.Generic`). Register it where that fails, where it counts
    other blocks than it should, or to run a batch of mixed depths in one pass.

    Args:
        model: the class, or its name, so that a family costs no import until a model of it
            turns up.
        backbone: the family.

    Raises:
        TypeError: ``model`` is neither, or ``backbone`` no class derived from Backbone that says
            which its blocks are and what its family is called.
    """
    if not isinstance(model, (str, type)):
        raise TypeError(f"register a class of models or its name, not {model!r}")
    if not (isinstance(backbone, type) and issubclass(backbone, Backbone)):
        raise TypeError(f"register a class derived from accelkit.Backbone, not {backbone!r}")
    if backbone.__abstractmethods__ or not isinstance(getattr(backbone, "family", None), str):
        raise TypeError(
            f"{backbone.__name__} has to say which its blocks are (the property blocks) and what "
            "its family is called (family)"
        )
    _families[model if isinstance(model, str) else model.__name__] = backbone


def backbone_of(model: nn.Module) -> Backbone:
    """Return the family's view of ``model``.

    Raises:
        AccelkitError: no family is registered for its class, and it is no diffusers model whose
            blocks a trial call shows.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in _families:
            return _families[kind.__name__](model)
    if any(kind.__name__ == "ModelMixin" for kind in type(model).__mro__):
        from accelkit.backbones.generic import Generic

        return Generic(model)
    raise AccelkitError(
        f"accelkit has no backbone for {type(model).__name__}; it knows "
        f"{', '.join(sorted(_families))} and diffusers' other transformers; tell it of another "
        "with accelkit.register_backbone(cls, backbone)"
    )


def denoiser_of(target: Any) -> nn.Module:
    """Return the network that a pipeline calls at every step, or ``target`` if it is a network.

    Raises:
        TypeError: ``target`` is neither.
    """
    model = called_by(target)
    return getattr(model, "_orig_mod", model)  # what torch.compile wrapped


def called_by(target: Any) -> nn.Module:
    """Return the network of a pipeline as it is called, be it one that torch.compile wrapped.

    Raises:
        TypeError: ``target`` is neither a pipeline nor a network.
    """
    candidates = (target, getattr(target, "transformer", None), getattr(target, "unet", None))
    for model in candidates:
        if isinstance(model, nn.Module):
            return model
    if hasattr(target, "components"):
        raise TypeError(
            f"this {type(target).__name__} has no network named transformer or unet; give the "
            "network that it calls at every step itself"
        )
    raise TypeError(f"expected a diffusers pipeline or a torch module, got {type(target).__name__}")
