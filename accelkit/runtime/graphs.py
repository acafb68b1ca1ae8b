"""Runs the fused passes of a model as graphs, one for each depth and batch size."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accelkit.backbones import stale
from accelkit.errors import AccelkitError
from accelkit.runtime.fused import FusedForward, Pass
from accelkit.runtime.switch import enabled_on
from accelkit.subject import Subject

GRAPHS = "graphs"

Run = Callable[[dict[str, Tensor]], Tensor]


def compile(target: Any, mode: str = GRAPHS, *, limit: int = 16) -> None:
    """Run the calls of an enabled model by one graph for each distinct depth and batch size.

    A graph is made at the first call that needs it, which takes longer. Labels, timesteps, weights
    written to in place (such as a merged adapter) and schedulers may change afterwards. Weights
    that are moved or exchanged drop all graphs. :func:`accelkit.disable` ends it.

    Args:
        target: a pipeline, network or subject with a schedule in force (:func:`accelkit.enable`;
            ``full`` for all blocks at every noise level).
        mode: ``graphs`` captures CUDA graphs of the fused forward; the name of a backend of
            ``torch.compile``, such as ``inductor``, compiles it.
        limit: number of graphs to keep; beyond it the least recently used is dropped.

    Raises:
        AccelkitError: no schedule is in force, the model has no fused forward or its kernels are
            off, there is no CUDA device to capture graphs on, or the backend is unknown.
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
    if mode not in torch.compiler.list_backends(exclude_tags=()):  # with those for debugging
        raise AccelkitError(
            f"mode={mode!r}; expected {GRAPHS!r} or a backend of torch.compile: "
            f"{', '.join(torch.compiler.list_backends())}"
        )
    fused.graphs = Graphs(fused, compiled(mode), limit)


class Graphs:
    """Runs fused passes as graphs, and drops the least recently used ones.

    A pass over a batch of mixed depths, or with a block that runs as its own module, runs without a
    graph: the first hardly ever repeats, and what the second does is unknown.

    Args:
        fused: the model's fused forward. Graphs are valid until its weights move, and see writes to
            them.
        make: turns a pass into a function that runs passes of the same key and sizes.
        limit: number of graphs to keep.
    """

    def __init__(self, fused: FusedForward, make: Callable[[Pass], Run], limit: int) -> None:
        self._fused, self._make, self._limit = fused, make, limit
        self._runs: OrderedDict[Any, Run] = OrderedDict()
        self._looks = 0  # of the fused forward, when the weights were seen
        self._weights: stale.Seen | None = None
        self._lock = threading.Lock()

    def __call__(self, each: Pass) -> Tensor:
        """Return the prediction of a pass."""
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
        """Whether weights were moved or exchanged since the last call."""
        looks, weights = self._fused.looks, self._weights
        if weights is not None and looks == self._looks and weights.same():
            return False
        model = self._fused.model
        self._looks, self._weights = looks, stale.places([*model.parameters(), *model.buffers()])
        return True

    def __len__(self) -> int:
        return len(self._runs)


def compiled(backend: str) -> Callable[[Pass], Run]:
    """Return a maker of graphs that compiles each pass whole, by a backend of torch.compile."""

    def make(each: Pass) -> Run:
        def run(tensors: dict[str, Tensor]) -> Tensor:
            return each(tensors)

        # dynamo keeps, counts and limits the graphs of each code object
        run.__code__ = run.__code__.replace(co_name=f"pass_of_{each.key[0]}_blocks")
        return torch.compile(run, backend=backend, fullgraph=True, dynamic=False)

    return make


def captured() -> Callable[[Pass], Run]:
    """Return a maker of graphs that captures passes as CUDA graphs with one pool of memory.

    The graphs run one after the other, even on different streams, since they share that memory.
    """
    pool = torch.cuda.graph_pool_handle()
    lock, last = threading.Lock(), torch.cuda.Event()

    def make(each: Pass) -> Run:
        # Tensors made in inference mode could not be written to outside of it.
        device = next(iter(each.tensors.values())).device
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            given = {name: t.clone() for name, t in each.tensors.items()}
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):  # Triton compiles, and cuBLAS allocates its workspace
                    each(given)
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # The mode allows other threads to allocate during the capture.
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
