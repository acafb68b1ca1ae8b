"""Which recorder of PyTorch's, if any, turns the calls that are being made into a graph.

A recording keeps the blocks that ran and not the schedule that chose them, so it would run every
noise level as deep as the one it was made at. ``torch.compile`` is no recorder: it makes a graph
for each depth and checks before every call which one holds.
"""

from __future__ import annotations

import torch
from torch.fx import _symbolic_trace
from torch.fx.experimental import proxy_tensor

from accelkit.errors import AccelkitError
from accelkit.schedule import Schedule


def by() -> str | None:
    """Return what records the calls of this thread, None if nothing does."""
    if torch.compiler.is_dynamo_compiling():  # which cannot trace the other checks
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
    """Raise AccelkitError while a call is recorded with a schedule that spends differently.

    A schedule that spends the same at every noise level records exactly.
    """
    if len(schedule.computes) > 1 and (recorder := by()) is not None:
        spent = ", ".join(map(str, schedule.computes))
        raise AccelkitError(
            f"{recorder} would record one depth of the schedule {schedule.name or schedule}, for "
            f"every noise level; record its depths ({spent}) one at a time, each with "
            "accelkit.enable(model, 'uniform:K')"
        )
