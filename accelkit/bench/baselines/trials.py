"""Trial runs of methods, and the error of a method that cannot run."""

from __future__ import annotations

from torch import nn

from accelkit.backbones.conditioning import Item
from accelkit.errors import AccelkitError
from accelkit.subject import Subject


class Unavailable(AccelkitError):  # noqa: N818 - a row of the comparison rather than its error
    """A method that is not installed or cannot run on this model; the reason is one sentence."""


def cannot_run(title: str, model: nn.Module, error: Exception) -> Unavailable:
    """Return the exception to raise for a method that failed on ``model`` with ``error``."""
    said = " ".join(str(error).split())[:200].rstrip(". ")
    kind = type(error).__name__
    reason = f"{kind}: {said}" if said else kind
    return Unavailable(f"{title} cannot run on this {type(model).__name__} ({reason})")


def some_items(subject: Subject, count: int) -> list[Item]:
    """Return classes or empty captions for a run whose images are not used."""
    if subject.calls.text:
        return [""] * count
    classes = subject.backbone.num_classes
    return [None if classes is None else index % classes for index in range(count)]
