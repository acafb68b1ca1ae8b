"""Keeps fused passes compiled or captured, one for each depth and size of batch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accelkit.runtime.fused.base import FusedForward, Pass

Run = Callable[[dict[str, Tensor]], Tensor]


class Graphs:
    """Runs fused passes by graphs, the least recently used of which are dropped.

    A pass over a batch of mixed depths, or with a block that runs as it is, is run as it comes: the
    one hardly ever repeats, and nothing is known of what the other does.

    Args:
        fused: the model's fused forward. Graphs hold as long as its weights lie where they were;
            written to in place, they are seen.
        make: turns a pass into what runs others of its key and sizes.
        limit: most graphs to keep.
    """

    def __init__(self, fused: FusedForward, make: Callable[[Pass], Run], limit: int) -> None:
        self._fused, self._make, self._limit = fused, make, limit
        self._runs: OrderedDict[Any, Run] = OrderedDict()
        self._looks = -1
        self._weights: list[Tensor] = []
        self._places: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, each: Pass) -> Tensor:
        """Return what a pass predicts."""
        with self._lock:
            run = self._run_of(each)
        return run(each.tensors)

    def _run_of(self, each: Pass) -> Run:
        if self._moved():
            self._runs.clear()
        if not each.repeats:
            return each
        sizes = tuple((name, t.shape, t.dtype, t.device) for name, t in each.tensors.items())
        key = (each.key, sizes)
        if (run := self._runs.get(key)) is None:
            while len(self._runs) >= self._limit:
                self._runs.popitem(last=False)
            run = self._make(each)
        self._runs[key] = run
        self._runs.move_to_end(key)
        return run

    def _moved(self) -> bool:
        """Whether weights lie elsewhere than at the last call, or are others."""
        if looked := self._fused.looks != self._looks:
            self._looks = self._fused.looks
            self._weights = [*self._fused.model.parameters(), *self._fused.model.buffers()]
        places = list(map(Tensor.data_ptr, self._weights))
        same, self._places = places == self._places, places
        return looked or not same

    def __len__(self) -> int:
        return len(self._runs)


def compiled(backend: str) -> Callable[[Pass], Run]:
    """Return what compiles passes by a backend of torch.compile's, each as one whole graph."""

    def make(each: Pass) -> Run:
        def run(tensors: dict[str, Tensor]) -> Tensor:
            return each(tensors)

        # dynamo keeps, counts and limits graphs by the code that they are of
        run.__code__ = run.__code__.replace(co_name=f"pass_of_{each.key[0]}_blocks")
        return torch.compile(run, backend=backend, fullgraph=True, dynamic=False)

    return make


def captured() -> Callable[[Pass], Run]:
    """Return what captures passes as CUDA graphs that share one pool of memory.

    They run one after the other, also on different streams: a graph writes where another did.
    """
    pool = torch.cuda.graph_pool_handle()
    lock, last = threading.Lock(), torch.cuda.Event()

    def make(each: Pass) -> Run:
        # tensors made in inference mode could not be written to outside of it
        device = next(iter(each.tensors.values())).device
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            given = {name: t.clone() for name, t in each.tensors.items()}
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):  # Triton compiles, cuBLAS takes its workspace
                    each(given)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # another thread may allocate meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = each(given)

        def run(tensors: dict[str, Tensor]) -> Tensor:
            with lock, torch.cuda.device(device):
                last.wait()
                for name, tensor in tensors.items():
                    given[name].copy_(tensor)
                graph.replay()
                found = output.clone()
                last.record()
            return found

        return run

    return make
