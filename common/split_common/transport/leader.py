"""Which thread reads what arrives for a peer: a caller that waits for a message, or else the transport's own.

One of the callers that wait reads as their leader (leader/followers: Schmidt et al., "Pattern-Oriented Software
Architecture", volume 2, 2000), so its message does not have to change threads. It leads for a short while, and only
if no other thread reads. Otherwise the transport's thread reads, after a gap for callers that come back soon.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

#: Longest time, in seconds, that a caller reads before it leaves reading to the transport's thread.
LEAD_WAIT = 0.05

#: Seconds after a caller got its message during which the transport's thread leaves reading to callers.
LEAD_GAP = 0.02

_T = TypeVar("_T")


class LeaderLock:
    """The right to read, which one thread at a time has.

    Args:
        read: takes what arrives within a number of seconds. It must not raise: a broken connection, or another
            caller's message, must not concern the caller that reads.
        closing: set when reading is to end.
    """

    def __init__(self, read: Callable[[float], object], closing: threading.Event) -> None:
        self._read = read
        self._closing = closing
        #: Held by the thread that reads.
        self.turn = threading.Lock()
        self._leader: int | None = None
        # Queues of callers that wait without reading, and the time when a caller last stopped waiting or reading.
        self._waiting: set[queue.SimpleQueue[Any]] = set()
        self._left = float("-inf")
        self._wanted = threading.Event()

    @property
    def held_by_another(self) -> bool:
        """Whether a thread other than this one reads."""
        return self._leader is not None and self._leader != threading.get_ident()

    def serve(self, wait: float) -> None:
        """One turn of the transport's thread: reads for `wait` seconds, or leaves that to callers for a while."""
        self._wanted.clear()
        if self.turn.acquire(blocking=False):
            try:
                if self._is_wanted():
                    self._lead(wait)
                    return
            finally:
                self.turn.release()
        self._wanted.wait(min(wait, LEAD_GAP))

    def _is_wanted(self) -> bool:
        """Whether the transport's thread should read.

        It should if a caller is blocked, or if no caller is likely to return within `LEAD_GAP`.
        """
        waiting = list(self._waiting)
        if any(events.empty() for events in waiting):
            return True
        return not waiting and time.monotonic() > self._left + LEAD_GAP

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        """The next item that a handler puts into `events`.

        Raises:
            queue.Empty: nothing came within `timeout` seconds.
        """
        until = time.monotonic() + timeout
        if events.empty() and self.turn.acquire(blocking=False):
            try:
                lead_until = min(until, time.monotonic() + LEAD_WAIT)
                while events.empty() and not self._closing.is_set() and (left := lead_until - time.monotonic()) > 0:
                    self._lead(left)
            finally:
                self._left = time.monotonic()
                self.turn.release()
                if self._waiting:
                    self._wanted.set()
        if not events.empty():
            return events.get_nowait()
        self._waiting.add(events)
        self._wanted.set()
        try:
            return events.get(timeout=max(0.0, until - time.monotonic()))
        finally:
            self._waiting.discard(events)
            self._left = time.monotonic()

    def _lead(self, wait: float) -> None:
        self._leader = threading.get_ident()
        try:
            self._read(wait)
        finally:
            self._leader = None
