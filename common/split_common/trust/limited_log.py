"""Lines of a log that members cause, so few of each that no member fills the disk."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from split_common.trust.shares import TokenBuckets

#: Lines of each member: a second on average, and at once.
LINES_RATE = 1.0
LINES_BURST = 64.0


class LimitedLog:
    """Logs what members do, of each member so many lines. Any thread may use it.

    Lines that are left out are counted. The member's next line that is logged says how many there were.

    Args:
        log: what it writes to.
        rate, burst: lines of each member, a second on average and at once.
    """

    def __init__(self, log: logging.Logger, rate: float = LINES_RATE, burst: float = LINES_BURST) -> None:
        self._log = log
        self._rates = TokenBuckets(rate, burst)
        self._left_out: Counter[str] = Counter()
        self._lock = threading.Lock()

    def info(self, member: str, message: str, *args: object) -> None:
        self._write(logging.INFO, member, message, args)

    def warning(self, member: str, message: str, *args: object) -> None:
        self._write(logging.WARNING, member, message, args)

    def error(self, member: str, message: str, *args: object) -> None:
        self._write(logging.ERROR, member, message, args)

    def _write(self, level: int, member: str, message: str, args: tuple[object, ...]) -> None:
        if not self._log.isEnabledFor(level):
            return
        with self._lock:
            if not self._rates.take(member):
                self._left_out[member] += 1
                return
            left_out = self._left_out.pop(member, 0)
        if left_out:
            message, args = message + " (%d lines of %s before it were left out)", (*args, left_out, member)
        self._log.log(level, message, *args)
