"""Finds out whether one of PyTorch's recorders is turning the current calls into a graph.

A recording keeps the blocks that ran, not the schedule that chose them. It would run every noise
level at the depth of the one that it was made at. ``torch.compile`` is no recorder in this sense:
it makes a graph for each depth and checks before every call which one applies.
"""

from __future__ import annotations

import torch
from torch.fx import _symbolic_trace
from torch.fx.experimental import proxy_tensor

from accelkit.errors import AccelkitError
from accelkit.schedule import Schedule


def by() -> str | None:
    """Return the name of the recorder of this thread's calls, None if there is none."""
    if torch.compiler.is_dynamo_compiling():  # dynamo cannot trace the other checks
        return "torch.export" if torch.compiler.is_exporting() else None
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    if proxy_tensor.get_proxy_mode() is not None:
        return "make_fx"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph"
    return "torch.fx" if _symbolic_trace.is_fx_symbolic_tracing() else None


def refuse(schedule: Schedule) -> None:
    """Raise AccelkitError if a call is being recorded and the schedule is not constant.

    A schedule that spends the same at every noise level is recorded exactly.
    """
    if len(schedule.computes) > 1 and (recorder := by()) is not None:
        spent = ", ".join(map(str, schedule.computes))
        raise AccelkitError(
            f"{recorder} would record one depth of the schedule {schedule.name or schedule} for "
            f"every noise level; record its depths ({spent}) one at a time, each with "
            "accelkit.enable(model, 'uniform:K')"
        )
