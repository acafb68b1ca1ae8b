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
from threading import Lock, Thread
from typing import TypeVar

import torch
from torch import Tensor

# Elements of the largest tensor, an MLP's hidden one. A share of more does not stay in the caches:
# 256 samples of 16 tokens by 256 features take 0.90 of the time in two halves one after the other,
# and no less in more; of large samples a part of any size took as long as all (16 of 256 by 1536).
# One of less is not worth a thread: 16 samples of those features took as long in two halves.
_MOST, _FEW, _LEAST = 1 << 19, 32, 1 << 17

T = TypeVar("T")

_pools: dict[int, ThreadPoolExecutor] = {}  # by the number of threads: one, the last that was used
_lock, _beginning = Lock(), Lock()


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
    if not sample.is_cpu or not batch * size:
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
    """Return what ``run`` makes of each part, so many at a time, without gradients.

    One after the other where no thread can be had: there are too many, or the interpreter ends.
    """
    parts = list(parts)
    if threads == 1:
        return list(map(run, parts))
    inference = torch.is_inference_mode_enabled()

    def alone(part: T) -> Tensor:
        with torch.inference_mode() if inference else torch.no_grad():
            return run(part)

    try:
        pool = _pool(threads)
        made = [pool.submit(alone, part) for part in parts]
    except RuntimeError:
        return list(map(run, parts))
    return [future.result() for future in made]


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads whose operators run on nothing but themselves."""
    with _lock:
        if threads not in _pools:
            for other in _pools.values():
                other.shutdown(wait=False)
            _pools.clear()
            _pools[threads] = ThreadPoolExecutor(threads, "accelkit", _begin)
        return _pools[threads]


def _begin() -> None:
    """Give this thread's operators one thread, and leave the number of all others as it is."""
    with _beginning:
        of_process = torch.get_num_threads()  # without asking, its first operator would take them
        torch.set_num_threads(1)  # of this thread, and of those whose first operator is to come
        restore = Thread(target=torch.set_num_threads, args=(of_process,))
        try:
            restore.start()
            restore.join()
        except RuntimeError:  # one thread more cannot be had: then this one is like the others
            torch.set_num_threads(of_process)


def _forget() -> None:
    """Begin anew in a forked child, which has none of the threads."""
    global _lock, _beginning
    _pools.clear()
    _lock, _beginning = Lock(), Lock()


os.register_at_fork(after_in_child=_forget)
