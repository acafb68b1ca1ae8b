"""A batch in shares on the CPU, a thread each, for what stays in a core's own caches.

PyTorch gives every operator to all threads and waits for all of them after each; what one of them
wrote, another reads next. A thread that takes its samples through all blocks finds them where it
left them. Time of two halves on a thread each, of that of the whole on two (two cores, float32):
0.61 for 64 samples of the built-in DiT and 0.74 for 256, 0.89 for 2 and for 16 of DiT-S/2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch
from torch import Tensor

# Elements of the largest tensor, an MLP's hidden one. A share of more does not stay in the caches:
# 256 samples of 16 tokens by 256 features take 0.90 of the time in two halves one after the other,
# and no less in more; of large samples a part of any size took as long as all (16 of 256 by 1536).
# One of less is not worth a thread: 16 samples of those features took as long in two halves.
_MOST, _FEW, _LEAST = 1 << 19, 32, 1 << 17

T = TypeVar("T")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = Lock()
os.register_at_fork(after_in_child=_pools.clear)  # a child has none of the threads


def share(sample: Tensor, tokens: int, hidden: int) -> tuple[int, int]:
    """Return how many samples a pass had better take at a time, and on how many threads.

    That is all of them on a GPU, and one thread, whose operators use all there are, where a graph
    is traced, a profiler or a mode of PyTorch's looks at the operators of this thread, or there are
    too few samples for every thread to have as many.

    Args:
        sample: (B, ...).
        tokens: of each sample.
        hidden: features of the largest tensor.
    """
    batch, size = len(sample), tokens * hidden
    if sample.is_cuda:
        return batch, 1
    threads = 1 if torch.compiler.is_compiling() or _looked_at() else torch.get_num_threads()
    # fewer shares than threads would leave some with nothing to do
    busy = batch * size >= threads * _LEAST and (batch % threads == 0 or batch >= 4 * threads)
    threads = threads if busy else 1
    most = _MOST // size if _MOST // size >= _FEW else batch
    rounds = -(-batch // (threads * most))
    return -(-batch // (threads * rounds)), threads


def _looked_at() -> bool:
    """Whether something looks at this thread's operators, and would miss those of others."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch.autograd._profiler_enabled()


def each(run: Callable[[T], Tensor], parts: Iterable[T], threads: int) -> list[Tensor]:
    """Return what ``run`` makes of each part, so many at a time, without gradients."""
    if threads == 1:
        return list(map(run, parts))
    inference = torch.is_inference_mode_enabled()

    def alone(part: T) -> Tensor:
        with torch.inference_mode() if inference else torch.no_grad():
            return run(part)

    return list(_pool(threads).map(alone, parts))


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads whose operators run on nothing but themselves."""
    with _lock:
        if threads not in _pools:
            before, ready = torch.get_num_threads(), Barrier(threads + 1)

            def begin() -> None:
                torch.get_num_threads()  # else a thread's first operator takes those of the process
                torch.set_num_threads(1)
                ready.wait()

            _pools[threads] = ThreadPoolExecutor(threads, "accelkit", begin)
            for _ in range(threads):
                _pools[threads].submit(int)
            ready.wait()
            torch.set_num_threads(before)  # which each of them set for threads to come, too
        return _pools[threads]
