"""The watchdog of the compute loop: if a turn hangs, the worker leaves the queue, and its sessions move."""

from __future__ import annotations

import time

#: A turn counts as hung after this many times the time that it would take at the pace of the slowest recent turns.
HUNG_FACTOR = 4.0

#: Seconds that the first turn may take, because its pace is not known.
FIRST_TURN = 60.0


class Watchdog:
    """Tells whether a turn takes so much longer than others that it may never end.

    `begin` and `end` are called on the compute loop's thread, `overdue` on any thread.

    Args:
        first_turn: seconds that the first turn may take.
        hung_after: seconds that any later turn may take at least.
    """

    def __init__(self, first_turn: float, hung_after: float) -> None:
        self._hung_after = hung_after
        self._allowed = first_turn
        self._began: float | None = None
        self._cost = 1
        #: Seconds per unit of cost in the slowest recent turns.
        self._slowest: float | None = None

    def begin(self, cost: int) -> None:
        """Notes that a turn begins, and how much it computes: tokens, or elements of images."""
        if self._slowest is not None:
            self._allowed = max(self._hung_after, HUNG_FACTOR * self._slowest * cost)
        self._cost = cost
        self._began = time.monotonic()

    def end(self) -> None:
        """Notes that the turn has ended."""
        assert self._began is not None
        pace = (time.monotonic() - self._began) / self._cost
        self._slowest = max(0.9 * (self._slowest or 0.0), pace)
        self._began = None

    def overdue(self) -> float:
        """Seconds that the current turn has taken, if it counts as hung; else 0."""
        took = time.monotonic() - began if (began := self._began) is not None else 0.0
        return took if took > self._allowed else 0.0
