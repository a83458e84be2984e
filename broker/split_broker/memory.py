"""The memory of the broker's process: how much it is, and which connections end when it is too much."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections.abc import Callable

import psutil

from split_broker.connections import Connection, Connections
from split_common.transport.base import HEARTBEAT

log = logging.getLogger(__name__)

#: Memory of a broker's process, in bytes, above which it ends connections.
MEMORY_LIMIT = 1536 * 1024 * 1024

#: A connection that holds less, in bytes, is not worth ending.
LEAST_HELD = 1024 * 1024


class MemoryWatch:
    """Keeps a process's memory below a limit by ending the connections that hold the most.

    Args:
        limit: resident memory, in bytes.
        connections: those of the process.
        queued: the bytes that wait in the broker for the peer on a connection.
    """

    def __init__(self, limit: int, connections: Connections, queued: Callable[[Connection], int]) -> None:
        self._limit = limit
        self._connections = connections
        self._queued = queued
        self._process = psutil.Process()
        self._short = 0
        self._next_unknown = 0.0

    def check(self) -> None:
        """Ends connections if the process has more memory than its limit.

        Those of strangers and of revoked members go first, then those that hold the most. Where a connection's
        bytes cannot be counted (ipc), all of them end, once a second at most: peers make new ones at once, and send
        again what was lost.
        """
        if self._excess() <= 0:
            return
        _trim()
        excess = self._excess()
        if excess <= 0:
            return
        self._short += 1
        if self._short.bit_count() == 1:
            log.warning("memory is %d MiB above the limit (%d times so far)", excess >> 20, self._short)
        now = time.monotonic()
        for connection, held in self._worst_first(unknown=now >= self._next_unknown):
            if excess <= 0:
                return
            if not held:
                self._next_unknown = now + HEARTBEAT
            self._connections.end(connection, "memory")
            excess -= held

    def _excess(self) -> int:
        return int(self._process.memory_info().rss) - self._limit

    def _worst_first(self, unknown: bool) -> list[tuple[Connection, int]]:
        """Connections that hold memory, and how many bytes: 0 where that is unknown, if those are asked for."""
        worst = []
        for connection in self._connections:
            unread, unsent = connection.unread(), connection.unsent()
            if unread is None or unsent is None:
                worst += [(connection, 0)] * unknown
            elif (held := unread + unsent + self._queued(connection)) > LEAST_HELD:
                worst.append((connection, held))
        return sorted(worst, key=lambda one: (one[0].member != "", -one[1]))


def _trim() -> None:
    """Gives free memory back to the system. Does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
