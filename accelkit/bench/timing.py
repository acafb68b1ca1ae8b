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

    Events are recorded in the GPU's queue, so that work still queued at a mark counts towards the
    part before it, and only :meth:`parts` waits for the GPU.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._marks: list[Any] = []

    @property
    def clock(self) -> str:
        """Name of the clock."""
        return "cuda events" if self._cuda else "perf_counter"

    def mark(self) -> None:
        """End the current part, if any, and begin the next."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def parts(self) -> list[float]:
        """Return the seconds between the marks, and clear the marks."""
        marks, self._marks = self._marks, []
        pairs = list(pairwise(marks))
        if not self._cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median ratio of the seconds of paired runs, and its 95% interval.

    The interval is the bootstrap's percentile interval (Efron 1979) over 10,000 draws, the same at
    every call.
    """
    ratios = np.divide(seconds, base)
    draws = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    return float(np.median(ratios)), [float(low), float(high)]


class Peak:
    """The most memory in use since this object was made, on systems that report it.

    On a GPU that is the memory allocated by PyTorch. Elsewhere it is the process's resident memory,
    whose peak Linux lets a process reset.
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
        """Return the most bytes in use so far, None if unknown."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._known:
            return None
        status = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(s.split()[1]) for s in status if s.startswith("VmHWM")), None)


class Energy:
    """The energy that a GPU used since this object was made, by NVML (``nvidia-ml-py``)."""

    def __init__(self, device: torch.device | str) -> None:
        self._read: Callable[[], float] | None = None
        if torch.device(device).type == "cuda":
            with contextlib.suppress(Exception):  # a missing driver or an old GPU
                self._read = _counter(torch.device(device))
        self._began = self._read() if self._read else 0.0

    def joules(self) -> float | None:
        """Return the joules used so far, None if unknown."""
        return self._read() - self._began if self._read else None


def _counter(device: torch.device) -> Callable[[], float]:
    import pynvml

    pynvml.nvmlInit()
    # NVML numbers all GPUs, PyTorch the visible ones only
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
