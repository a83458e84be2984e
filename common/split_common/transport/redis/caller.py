"""Calls of a peer's handler by the threads of a Redis link: one at a time, as handlers expect."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from split_common.protocol import headers
from split_common.transport.base import Handler
from split_common.transport.placement import Refuse
from split_common.transport.supervised import handled


class Caller:
    """Calls a peer's handler from several threads, one at a time. The handler's errors are counted, not raised."""

    def __init__(self, handler: Handler, counters: Counter[str]) -> None:
        self._handler = handler
        self._counters = counters
        self._lock = threading.Lock()

    def message(self, header: headers.AnyHeader, body: bytes) -> None:
        with self._lock:
            handled(self._counters, self._handler.on_message, header, body)

    def refuse(self, header: headers.Relay | headers.Open, refusal: Refuse) -> None:
        """Tells the peer that its message was not delivered."""
        self._counters[f"bounced_{refusal.reason}"] += 1
        self.message(refusal.bounce(header), b"")

    def gone(self, peers: Iterable[bytes]) -> None:
        with self._lock:
            handled(self._counters, self._handler.on_gone, peers)

    def reset(self) -> None:
        with self._lock:
            handled(self._counters, self._handler.on_reset)

    def roster(self) -> None:
        with self._lock:
            handled(self._counters, self._handler.on_roster)

    def announcement(self) -> headers.Announce | None:
        """The peer's heartbeat; None if the handler failed."""
        with self._lock:
            return handled(self._counters, self._handler.announcement)
