"""Calls that other threads ask the generator's loop to make."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

#: A turn waits for further replies until none has come for this many seconds.
REPLY_GAP = 0.003

#: Longest time, in seconds, that a turn waits for further replies.
MAX_REPLY_WAIT = 0.05


class Inbox:
    """Calls to be made on the loop's thread, in order. Any thread may `put` one; the loop's alone makes them."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def put(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    @property
    def empty(self) -> bool:
        return self._calls.empty()

    def wait(self, until: float | None) -> bool:
        """Makes the next call, for which it waits until then by `time.monotonic`. Returns whether there was one."""
        try:
            self._calls.get(timeout=None if until is None else max(0.0, until - time.monotonic()))()
        except queue.Empty:
            return False
        return True

    def gather(self, expects: Callable[[], bool]) -> None:
        """Makes all calls, and those that are imminent.

        Args:
            expects: whether some may come, in each moment.
        """
        until = time.monotonic() + MAX_REPLY_WAIT
        while True:
            try:
                self._calls.get(timeout=REPLY_GAP if expects() and time.monotonic() < until else 0.0)()
            except queue.Empty:
                return

    def drain(self) -> None:
        """Makes the calls that are there."""
        while not self._calls.empty():
            self._calls.get()()
