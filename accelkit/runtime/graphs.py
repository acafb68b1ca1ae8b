"""One graph per depth and batch size for a model with a schedule in force."""

from __future__ import annotations

from typing import Any

import torch

from accelkit.errors import AccelkitError
from accelkit.runtime.fused.graphs import Graphs, captured, compiled
from accelkit.runtime.switch import enabled_on
from accelkit.subject import Subject

GRAPHS = "graphs"


def compile(target: Any, mode: str = GRAPHS, *, limit: int = 16) -> None:
    """Run the calls of an enabled model by one graph for each distinct depth and batch size.

    A graph is made at the first call that needs it; that call takes longer. Labels, timesteps,
    weights written to in place (a merged adapter, say) and schedulers may change under it. Weights
    that move or are exchanged drop all graphs. :func:`accelkit.disable` ends it.

    Args:
        target: a pipeline, network or subject with a schedule in force (:func:`accelkit.enable`;
            ``full`` for all blocks at every noise level).
        mode: ``graphs`` captures CUDA graphs of the fused forward; the name of a backend of
            ``torch.compile``, such as ``inductor``, compiles it.
        limit: most graphs to keep; the least recently used is dropped for another.

    Raises:
        AccelkitError: no schedule is in force, its model has no fused forward or kernels are off,
            there is no CUDA device to capture graphs on, or the backend is unknown.
    """
    subject = Subject.of(target)
    state = enabled_on(subject)
    name = type(subject.model).__name__
    if state is None:
        raise AccelkitError(
            f"this {name} runs no schedule; call accelkit.enable first, with 'full' for all blocks"
        )
    if not isinstance(limit, int) or limit < 1:
        raise AccelkitError(f"limit={limit!r}; give how many graphs to keep, at least 1")
    fused = state.fused
    if fused is None:
        raise AccelkitError(
            f"this {name} runs its own modules ({state.paths()[0].partition(': ')[2]}); use "
            "torch.compile on it, which makes one graph for each depth"
        )
    if mode == GRAPHS:
        if state.backbone.model.device.type != "cuda":
            raise AccelkitError(
                f"CUDA graphs need a CUDA device, this {name} is on the "
                f"{state.backbone.model.device.type}; move it there first, or name a backend of "
                "torch.compile such as 'inductor'"
            )
        fused.graphs = Graphs(fused, captured(), limit)
        return
    if mode not in torch.compiler.list_backends(exclude_tags=()):  # those to debug with, too
        raise AccelkitError(
            f"mode={mode!r}; expected {GRAPHS!r} or a backend of torch.compile: "
            f"{', '.join(torch.compiler.list_backends())}"
        )
    fused.graphs = Graphs(fused, compiled(mode), limit)
