"""Lets calls of a model run at the same time, and changes to its weights only without them."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Any number of calls pass together; a change waits until they have finished.

    A thread may make a change within its own call, as a hook that saves the model does. Such a
    change is made at once, even if other threads are in a call: two calls that wait for each other
    would deadlock. So does a call that joins a thread which is waiting to make a change.
    """

    def __init__(self) -> None:
        self.reset()
        _gates.add(self)

    def reset(self) -> None:
        """Forget the calls under way, as in a forked child, which lacks their threads."""
        self._moved = threading.Condition(threading.RLock())
        self._inside: Counter[int] = Counter()  # calls under way, by thread
        self._waiting = 0  # changes, before which no other call may begin

    @contextmanager
    def change(self) -> Iterator[None]:
        """Wait for the calls under way, and keep new ones out while entered."""
        with self._moved:
            self._waiting += 1
            try:
                while self._others_inside():
                    self._moved.wait()
                yield
            finally:
                self._waiting -= 1
                self._moved.notify_all()

    @contextmanager
    def call(
        self, stale: Callable[[], bool] = lambda: False, change: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Keep changes out while entered.

        Args:
            stale: whether a change has to come first.
            change: makes it.
        """
        own = threading.get_ident()
        with self._moved:
            while own not in self._inside and self._waiting:
                self._moved.wait()
            while (needed := stale()) and self._others_inside():
                self._moved.wait()
            if needed:
                change()
            self._inside[own] += 1
        try:
            yield
        finally:
            with self._moved:
                self._inside[own] -= 1
                if self._inside[own] <= 0:  # negative in a child that was forked within the call
                    del self._inside[own]
                    self._moved.notify_all()

    def _others_inside(self) -> bool:
        return bool(self._inside) and threading.get_ident() not in self._inside


_gates: weakref.WeakSet[Gate] = weakref.WeakSet()


def _forget() -> None:
    for gate in _gates:
        gate.reset()


os.register_at_fork(after_in_child=_forget)
