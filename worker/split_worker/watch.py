"""Whether the compute loop gets on: one that hangs must not keep its sessions."""

from __future__ import annotations

import time

#: Seconds after which a turn of the compute loop may be held to hang: three heartbeats. One with many tokens gets
#: more: so many times what the slowest ones of late would have taken. Of the first one nothing is known.
HUNG_AFTER = 3.0
HUNG_FACTOR = 4.0
FIRST_TURN = 60.0


class Watch:
    """Whether a turn of the compute loop takes so much longer than others that it may never end.

    Args:
        first_turn: seconds for the first one.
    """

    def __init__(self, first_turn: float = FIRST_TURN) -> None:
        self._began: float | None = None
        self._allowed = first_turn
        #: Seconds for each token of the slowest turns of late.
        self._slowest: float | None = None

    def begin(self, tokens: int) -> None:
        if self._slowest is not None:
            self._allowed = max(HUNG_AFTER, HUNG_FACTOR * self._slowest * tokens)
        self._tokens = tokens
        self._began = time.monotonic()

    def end(self) -> None:
        assert self._began is not None
        took = (time.monotonic() - self._began) / self._tokens
        self._slowest = max(0.9 * (self._slowest or 0.0), took)
        self._began = None

    def overdue(self) -> float:
        """Seconds that the turn under way has taken, if they are too many; else 0."""
        took = time.monotonic() - began if (began := self._began) is not None else 0.0
        return took if took > self._allowed else 0.0
