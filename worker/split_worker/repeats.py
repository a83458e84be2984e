"""What one member may ask of a worker again and again: kept replies, and sessions that are not open."""

from __future__ import annotations

import time
from typing import Any

from split_common.trust.shares import TokenBucket
from split_worker.limits import WorkerLimits
from split_worker.sessions import Frames, Session


class Repeats:
    """Decides whether a kept reply is sent again. Used under the worker's lock.

    A request of some bytes may ask for a reply of megabytes, which the device need not read. A reply that is
    withheld is asked for again: a device repeats its request until it is answered.
    """

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._rates: dict[str, TokenBucket] = {}

    def allow(self, session: Session[Any], frames: Frames) -> bool:
        """Whether a reply may be sent again now. If so, it counts as sent."""
        limits, (header, body), now = self._limits, frames, time.monotonic()
        if now - session.repeated.get(header.seq, float("-inf")) < limits.repeat_after:
            return False
        rate = self._rates.get(session.member)
        if rate is None:
            rate = self._rates[session.member] = TokenBucket(limits.repeat_rate, limits.repeat_burst)
        if not rate.take(len(body)):
            return False
        session.repeated[header.seq] = now
        return True


class Strays:
    """Decides whether a request for a session that is not open is looked at. Used under the worker's lock.

    It opens the session, or has come too late. Whoever sends many of them makes the worker derive keys for nothing.
    """

    def __init__(self, limits: WorkerLimits) -> None:
        self._limits = limits
        self._rates: dict[str, TokenBucket] = {}

    def allow(self, member: str) -> bool:
        """Whether one more of a member's is looked at. If so, it is counted."""
        rate = self._rates.get(member)
        if rate is None:
            rate = self._rates[member] = TokenBucket(self._limits.stray_rate, self._limits.stray_burst)
        return rate.take()
