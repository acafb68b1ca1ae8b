"""Lets calls of one model run at the same time, and what moves its weights only without them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Any number of calls go through together; a change waits until they have left.

    A thread may make a change within its own call, as a hook that saves the model does. Such a
    change waits for nobody: two of them would wait for each other and never end.
    """

    def __init__(self) -> None:
        self._moved = threading.Condition(threading.RLock())
        self._inside: Counter[int] = Counter()  # calls under way, by thread

    @contextmanager
    def change(self) -> Iterator[None]:
        """Keep calls out for as long as it is entered, once those under way have left."""
        with self._moved:
            while self._others_inside():
                self._moved.wait()
            yield

    @contextmanager
    def call(
        self, stale: Callable[[], bool] = lambda: False, change: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Keep changes out for as long as it is entered.

        Args:
            stale: whether a change has to come first.
            change: makes it.
        """
        own = threading.get_ident()
        with self._moved:
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
                if not self._inside[own]:
                    del self._inside[own]
                    self._moved.notify_all()

    def _others_inside(self) -> bool:
        return bool(self._inside) and threading.get_ident() not in self._inside
