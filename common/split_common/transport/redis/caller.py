"""How the threads of a Redis link call the peer's handler, which is written for one thread."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable

from split_common import headers
from split_common.errors import SplitError
from split_common.transport import Handler, count_dropped

log = logging.getLogger(__name__)


class Caller:
    """Calls a peer's handler from several threads, one at a time; what it raises is counted."""

    def __init__(self, handler: Handler, counters: Counter[str]) -> None:
        self._handler = handler
        self._counters = counters
        self._lock = threading.Lock()

    def message(self, header: headers.AnyHeader, body: bytes) -> None:
        self._call(lambda: self._handler.on_message(header, body))

    def gone(self, peers: Iterable[bytes]) -> None:
        self._call(lambda: self._handler.on_gone(peers))

    def reset(self) -> None:
        self._call(self._handler.on_reset)

    def roster(self) -> None:
        self._call(self._handler.on_roster)

    def announcement(self) -> headers.Announce | None:
        """None when the handler failed."""
        announcements: list[headers.Announce] = []
        self._call(lambda: announcements.append(self._handler.announcement()))
        return announcements[0] if announcements else None

    def _call(self, call: Callable[[], None]) -> None:
        try:
            with self._lock:
                call()
        except SplitError as error:
            count_dropped(self._counters, error)
        except Exception:
            self._counters["HandlerError"] += 1
            log.exception("a message handler failed")
