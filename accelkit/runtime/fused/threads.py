"""Splits a batch on the CPU into shares, one a thread, that stay in each core's own caches.

PyTorch splits every operator among all threads and waits for all of them after each, so that one
thread reads what another wrote. A thread that takes its samples through all blocks finds them in
its own caches. Two halves on a thread each took this share of the time of the whole batch on two
threads (two cores, float32): 0.61 for 64 samples of the built-in DiT and 0.74 for 256, 0.89 for 2
and for 16 of DiT-S/2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock, Thread
from typing import TypeVar

import torch
from torch import Tensor

# Elements of the largest tensor, which is an MLP's hidden one. More than _MOST do not stay in the
# caches: 256 samples of 16 tokens by 256 features take 0.90 of the time in two halves one after the
# other, and no less in more parts. Batches of large samples gain nothing from parts (16 of 256 by
# 1536). Less than _LEAST is not worth a thread: 16 samples of those features take as long in two.
_MOST, _FEW, _LEAST = 1 << 19, 32, 1 << 17

T = TypeVar("T")

_pools: dict[int, ThreadPoolExecutor] = {}  # the pool used last, by its number of threads
_lock, _beginning = Lock(), Lock()


def share(sample: Tensor, tokens: int, hidden: int) -> tuple[int, int]:
    """Return how many samples a pass should take at a time, and on how many threads.

    On a GPU that is all samples on one thread. On the CPU it is one thread, whose operators use all
    cores, while a graph is traced, while a profiler or a mode of PyTorch records the operators of
    this thread, and if there are too few samples for equal shares.

    Args:
        sample: (B, ...).
        tokens: number of tokens of a sample.
        hidden: features of the largest tensor.
    """
    batch, size = len(sample), tokens * hidden
    if not sample.is_cpu or not batch * size:
        return batch, 1
    threads = 1 if torch.compiler.is_compiling() or _recorded() else torch.get_num_threads()
    # With fewer shares than threads, some threads would be idle.
    busy = batch * size >= threads * _LEAST and (batch % threads == 0 or batch >= 4 * threads)
    threads = threads if busy else 1
    most = _MOST // size if _MOST // size >= _FEW else batch
    rounds = -(-batch // (threads * most))
    return -(-batch // (threads * rounds)), threads


def _recorded() -> bool:
    """Whether something records this thread's operators, and would miss those of other threads."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch.autograd._profiler_enabled()


def each(run: Callable[[T], Tensor], parts: Iterable[T], threads: int) -> list[Tensor]:
    """Return ``run(part)`` for each part, computed by a number of threads without gradients.

    They run one after the other if no thread can be started: there are too many, or the interpreter
    is ending.
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
    """Return a pool of threads, each of which runs its operators alone."""
    with _lock:
        if threads not in _pools:
            for other in _pools.values():
                other.shutdown(wait=False)
            _pools.clear()
            _pools[threads] = ThreadPoolExecutor(threads, "accelkit", _begin)
        return _pools[threads]


def _begin() -> None:
    """Limit this thread's operators to one thread, without a change for other threads.

    Setting the number also sets the default of threads that have not run an operator yet, so that
    another thread sets it back.
    """
    with _beginning:
        of_process = torch.get_num_threads()  # this initialises the thread before it is limited
        torch.set_num_threads(1)
        restore = Thread(target=torch.set_num_threads, args=(of_process,))
        try:
            restore.start()
            restore.join()
        except RuntimeError:  # no thread can be started, so this one is not limited either
            torch.set_num_threads(of_process)


def _forget() -> None:
    """Start without pools in a forked child, which has none of the threads."""
    global _lock, _beginning
    _pools.clear()
    _lock, _beginning = Lock(), Lock()


os.register_at_fork(after_in_child=_forget)
