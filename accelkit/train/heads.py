"""Heads of their own for the exits that a sample passes by, for as long as a training lasts.

Whether the parts of a depth-varying network share their head, the paper leaves open; that the
parameters stay those of the baseline speaks for one. Then one head, at one timestep, is asked for
the noise after all blocks and for another target after fewer. With a head of its own for every
earlier exit the blocks alone are shared; it begins as a copy of the network's and is thrown away in
the end, since a sample that leaves there by its own noise level takes the network's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from accelkit.backbones import Backbone
from accelkit.errors import AccelkitError


def check(backbone: Backbone) -> None:
    """Raise AccelkitError for a model whose head is not known."""
    if not _names(backbone):
        raise AccelkitError(
            f"the head of a {type(backbone.model).__name__} is not known, so that earlier exits "
            "cannot have their own; register a backbone whose head names it, or train with "
            "--intermediate-head shared"
        )


class OwnHeads(nn.Module):
    """A head for each of some exits, which the model itself does not hold.

    So nothing of them is left in it. A process's share of a batch may pass no exit by, or not all
    of them, and no output of the model tells: their gradients are averaged by :meth:`synchronize`.

    Args:
        backbone: of the model, on the device that it is trained on.
        depths: of the exits; none leaves the network's head to all.
    """

    def __init__(self, backbone: Backbone, depths: Sequence[int]) -> None:
        super().__init__()
        paths = [name.rpartition(".") for name in _names(backbone)]
        self._places = [(backbone.model.get_submodule(parent), leaf) for parent, _, leaf in paths]
        self.at_depth = nn.ModuleDict(
            {
                str(depth): nn.ParameterList(
                    nn.Parameter(getattr(module, leaf).detach().clone())
                    for module, leaf in self._places
                )
                for depth in depths
            }
        )

    @contextmanager
    def used(self, depth: int) -> Iterator[None]:
        """Put the head of a depth in the place of the network's, as long as it is entered."""
        if str(depth) not in self.at_depth:
            yield
            return
        shared = [getattr(module, leaf) for module, leaf in self._places]
        self._put(self.at_depth[str(depth)])  # type: ignore[arg-type]
        try:
            yield
        finally:
            self._put(shared)

    def synchronize(self, accelerator: Any) -> None:
        """Average the gradients over all processes; one without counts as 0."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = parameter.new_zeros(parameter.shape)
            parameter.grad = accelerator.reduce(parameter.grad, "mean")

    def _put(self, parameters: Iterable[nn.Parameter]) -> None:
        for (module, leaf), parameter in zip(self._places, parameters, strict=True):
            setattr(module, leaf, parameter)


def _names(backbone: Backbone) -> list[str]:
    within = tuple(f"{part}." for part in backbone.head)
    names = (name for name, _ in backbone.model.named_parameters())
    return [name for name in names if name in backbone.head or name.startswith(within)]
