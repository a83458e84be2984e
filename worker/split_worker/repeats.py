"""Kept replies that are sent again: how often, and how many bytes to one member."""

from __future__ import annotations

import time
from typing import Any

from split_common.trust.shares import TokenBuckets
from split_worker.limits import WorkerLimits
from split_worker.sessions import Frames, Session


class Repeats:
    """Decides whether a kept reply is sent again. Used under the worker's lock.

    A request of some bytes may ask for a reply of megabytes, which the device need not read. A reply that is
    withheld is asked for again: a device repeats its request until it is answered.
    """

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._rates = TokenBuckets(limits.repeat_rate, limits.repeat_burst)

    def allow(self, session: Session[Any], frames: Frames) -> bool:
        """Whether a reply may be sent again now. If so, it counts as sent."""
        limits, (header, body), now = self._limits, frames, time.monotonic()
        if now - session.repeated.get(header.seq, float("-inf")) < limits.repeat_after:
            return False
        if not self._rates.take(session.member, len(body)):
            return False
        session.repeated[header.seq] = now
        return True
