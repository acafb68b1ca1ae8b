"""Times of interleaved runs, intervals of their ratios, memory and energy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Stopwatch:
    """Seconds between marks, by CUDA events on a GPU and ``time.perf_counter`` elsewhere.

    Events are taken where the work is, so that what is still queued at a mark is not counted to the
    part behind it, and nothing has to wait for them but :meth:`parts`.

    Args:
        device: where the work is.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._marks: list[Any] = []

    @property
    def clock(self) -> str:
        """What tells the time."""
        return "cuda events" if self._cuda else "perf_counter"

    def mark(self) -> None:
        """Begin, or end a part and begin the next."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def parts(self) -> list[float]:
        """Return the seconds between marks, and forget them."""
        marks, self._marks = self._marks, []
        pairs = list(pairwise(marks))
        if not self._cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median of the ratios of runs to their neighbours, and its 95% interval.

    The interval is of the bootstrap's percentiles (Efron 1979) over 10,000 draws of as many ratios;
    they are the same at every call.

    Args:
        seconds: of the rounds.
        base: of what ran beside them in the same rounds.
    """
    ratios = np.divide(seconds, base)
    draws = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    return float(np.median(ratios)), [float(low), float(high)]


class Peak:
    """The most memory in use since it was made, where that can be told.

    On a GPU that is what PyTorch allocated there; elsewhere the process's resident memory, whose
    highest mark Linux lets a process take back.

    Args:
        device: where the work is.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._known = True
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._known = False

    def bytes(self) -> int | None:
        """Return the most bytes in use so far; None if that is not known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._known:
            return None
        status = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(s.split()[1]) for s in status if s.startswith("VmHWM")), None)


class Energy:
    """The energy that a GPU took since this was made, by NVML (``pip install nvidia-ml-py``).

    Args:
        device: where the work is.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._read: Callable[[], float] | None = None
        if torch.device(device).type == "cuda":
            with contextlib.suppress(Exception):  # NVML's own, of a missing driver or an old GPU
                self._read = _counter(torch.device(device))
        self._began = self._read() if self._read else 0.0

    def joules(self) -> float | None:
        """Return the energy so far; None where it is not told."""
        return self._read() - self._began if self._read else None


def _counter(device: torch.device) -> Callable[[], float]:
    import pynvml

    pynvml.nvmlInit()
    # NVML counts all GPUs, PyTorch those that are visible
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
