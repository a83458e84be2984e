"""What is learned from how long forwards take: how much prefill one may have, and how long the next one waits."""

from __future__ import annotations

import time
from collections.abc import Hashable

#: Fewest and most tokens of prefill in one forward, if any are ready.
MIN_CHUNK = 16
MAX_CHUNK = 512

#: How much longer prefill may make a forward while sessions decode, as a share of a forward without prefill.
SLACK = 1.0

#: Seconds for which a session counts as decoding after its last step.
DECODING_FOR = 1.0

#: How far ahead a forward waits for sessions that are due back, and how late they may be, in durations of a
#: forward.
WAIT_AHEAD = 1.0

#: How long after its answer a session is waited for at most, in durations of a forward.
MAX_WAIT = 5.0


class ChunkBudget:
    """How many tokens of prefill a forward may take, learned from how long forwards take."""

    def __init__(self) -> None:
        #: Average seconds of a forward without prefill; 0 before the first one.
        self.base = 0.0
        #: Average seconds that a token of prefill adds to a forward.
        self._token = 0.0
        self._decoded_at = float("-inf")

    def observe(self, decoding: int, prefill: int, seconds: float) -> None:
        """Learns from a forward with this many decoding runs and tokens of prefill."""
        if decoding:
            self._decoded_at = time.monotonic()
        if not prefill:
            self.base = _average(self.base, seconds)
        elif self.base or not decoding:
            others = self.base if decoding else 0.0
            self._token = _average(self._token, max(0.0, seconds - others) / prefill)

    def tokens(self) -> int:
        """Tokens of prefill for the next forward."""
        if time.monotonic() - self._decoded_at > DECODING_FOR:
            return MAX_CHUNK
        if not self._token:
            return MIN_CHUNK
        return max(MIN_CHUNK, min(MAX_CHUNK, int(SLACK * self.base / self._token)))


def _average(old: float, new: float) -> float:
    return new if not old else 0.8 * old + 0.2 * new


class BatchDelay:
    """How long the next forward waits for sessions that are due back with their next step (dynamic batching).

    A forward of many sequences takes hardly longer than one of a few. Without the delay, a session that returns
    just after the start would wait for the whole forward, and sessions that once shared forwards would drift apart.
    """

    def __init__(self) -> None:
        #: When each session that has not returned yet was answered.
        self._away: dict[Hashable, float] = {}
        #: Average seconds between a session's answer and its return.
        self._turnaround: dict[Hashable, float] = {}

    def answered(self, session: Hashable, now: float) -> None:
        """Notes that a session was answered, and so may return."""
        self._away[session] = now

    def returned(self, session: Hashable, now: float) -> None:
        """Notes that a session has sent its next step."""
        if (since := self._away.pop(session, None)) is not None:
            self._turnaround[session] = _average(self._turnaround.get(session, 0.0), now - since)

    def forget(self, session: Hashable) -> None:
        """Forgets a session that has ended."""
        self._away.pop(session, None)
        self._turnaround.pop(session, None)

    def until(self, forward: float, now: float) -> float:
        """The deadline for starting the next forward; 0 if no session is due.

        Args:
            forward: expected duration of the next forward, in seconds.
            now: the time, in seconds of the clock that `answered` and `returned` were given.
        """
        longest, ahead = MAX_WAIT * forward, WAIT_AHEAD * forward
        until = 0.0
        for session, since in self._away.items():
            usual = self._turnaround.get(session, longest)
            if usual < longest and since + usual < now + ahead:
                until = max(until, since + min(longest, usual + ahead))
        return until
