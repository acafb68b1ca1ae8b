"""Which backbone a model has: families by class name, and the network that a pipeline calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from accelkit.backbones.base import Backbone
from accelkit.backbones.conditioning import Conditioning, register_conditioning
from accelkit.errors import AccelkitError

_families: dict[str, type[Backbone]] = {}

Family = TypeVar("Family", bound=type[Backbone])


def register_backbone(model: str | type[nn.Module], backbone: type[Backbone]) -> None:
    """Use ``backbone`` for models of a class and of classes derived from it.

    A family whose blocks follow one another names its blocks and what runs after them::

        import accelkit

        class MyBackbone(accelkit.Backbone):
            family = "mine"
            blocks = "transformer_blocks"
            exit = "norm_out"
            batched = ("hidden_states", "encoder_hidden_states")  # of the model's call
            block_batched = ("encoder_hidden_states", "temb")  # of a block's call

        accelkit.register_backbone(MyTransformer2DModel, MyBackbone)
        accelkit.enable(pipe, "D4")

    ``blocks`` may also be a tuple of names, for several lists in a row, and both may be properties
    that return the modules. Blocks that return several states name them in ``states``, in the order
    in which they return them; ``skipped`` returns what a skipped block would where blocks differ.
    A model that is given another number than the scheduler's timestep sets ``timestep_scale`` and
    ``timestep_offset``. Blocks that still do something when skipped, such as joining a long skip,
    set ``sequential = False`` and do it in ``skipped``. Without ``block_batched``, samples of
    different depths are run in one pass per depth.

    A diffusers model of an unregistered class is examined in a trial call without weights
    (:class:`accelkit.backbones.generic.Generic`). Register it if that fails, if it counts other
    blocks than it should, or to run a batch of mixed depths in one pass.

    Args:
        model: the class, or its name, so that nothing is imported until such a model turns up.
        backbone: the family.

    Raises:
        TypeError: ``model`` is neither a class nor a name, or ``backbone`` is not a class derived
            from Backbone that names its blocks and its family.
    """
    if not isinstance(model, (str, type)):
        raise TypeError(f"register a class of models or its name, not {model!r}")
    if not (isinstance(backbone, type) and issubclass(backbone, Backbone)):
        raise TypeError(f"register a class derived from accelkit.Backbone, not {backbone!r}")
    if backbone.__abstractmethods__ or not isinstance(getattr(backbone, "family", None), str):
        raise TypeError(
            f"{backbone.__name__} has to name its blocks (blocks) and its family (family)"
        )
    _families[model if isinstance(model, str) else model.__name__] = backbone


def family(*models: str, called: type[Conditioning] | None = None) -> Callable[[Family], Family]:
    """Return a decorator that registers a family for models of these class names.

    Args:
        *models: names of the classes.
        called: how these models are called to train or sample them; by default with class labels,
            if any, and nothing else.
    """

    def register(backbone: Family) -> Family:
        for model in models:
            register_backbone(model, backbone)
            if called is not None:
                register_conditioning(model, called)
        return backbone

    return register


def backbone_of(model: nn.Module) -> Backbone:
    """Return the backbone of ``model``.

    Raises:
        AccelkitError: no family is registered for its class, and it is not a diffusers model whose
            blocks can be found in a trial call.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in _families:
            return _families[kind.__name__](model)
    if any(kind.__name__ == "ModelMixin" for kind in type(model).__mro__):
        from accelkit.backbones.generic import Generic

        return Generic(model)
    raise AccelkitError(
        f"accelkit has no backbone for {type(model).__name__}; it knows "
        f"{', '.join(sorted(_families))} and diffusers' other transformers; add one with "
        "accelkit.register_backbone(cls, backbone)"
    )


def denoiser_of(target: Any) -> nn.Module:
    """Return the network that a pipeline calls at every step, or ``target`` if it is a network.

    Raises:
        TypeError: ``target`` is neither a pipeline nor a network.
    """
    model = called_by(target)
    return getattr(model, "_orig_mod", model)  # the module that torch.compile wrapped


def called_by(target: Any) -> nn.Module:
    """Return the network of a pipeline as it is called, possibly wrapped by torch.compile.

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
            "network that it calls at every step instead"
        )
    raise TypeError(f"expected a diffusers pipeline or a torch module, got {type(target).__name__}")
