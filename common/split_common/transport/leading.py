"""Who reads what arrives for a peer: a caller that waits for a message, or else the transport's own thread.

The caller reads as the leader among those who wait (Schmidt et al., "Pattern-Oriented Software Architecture",
volume 2, 2000: leader/followers): his message need not change threads. He does so for a short while, and only if
nobody else reads. Otherwise the transport's thread does, and leaves a gap for callers who come back soon.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

#: Seconds that a caller's reading waits for his message.
LEAD_WAIT = 0.05

#: Seconds after a caller had his message during which the transport's thread leaves it to him to read again.
LEAD_GAP = 0.02

_T = TypeVar("_T")


class Lead:
    """The right to read, which one thread at a time has.

    Args:
        read: takes what arrives within some seconds. No error gets out of it: what is wrong with a connection, or
            with another one's message, must not hit the caller who reads.
        closing: set when nobody is to read any more.
    """

    def __init__(self, read: Callable[[float], None], closing: threading.Event) -> None:
        self._read = read
        self._closing = closing
        #: Held by who reads.
        self.turn = threading.Lock()
        self._leader: int | None = None
        # What callers wait for who do not read; and when one of those who wait or read last left.
        self._waiting: set[queue.SimpleQueue[Any]] = set()
        self._left = float("-inf")
        self._wanted = threading.Event()

    @property
    def is_anothers(self) -> bool:
        """Whether a thread other than this one reads."""
        return self._leader is not None and self._leader != threading.get_ident()

    def serve(self, wait: float) -> None:
        """For the transport's thread: reads for some seconds if it should, else leaves that to callers a while."""
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
        """Whether the thread should read: somebody waits for it, or nobody will come back soon to read himself."""
        waiting = list(self._waiting)
        if any(events.empty() for events in waiting):
            return True
        return not waiting and time.monotonic() > self._left + LEAD_GAP

    def receive(self, events: queue.SimpleQueue[_T], timeout: float) -> _T:
        """The next of what a handler puts into `events`. Raises queue.Empty after `timeout` seconds."""
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
