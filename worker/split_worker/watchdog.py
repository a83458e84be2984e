"""The watchdog of the compute loop: if a turn hangs, the worker leaves the queue, and its sessions move."""

from __future__ import annotations

import time

#: A turn with much to compute gets more time: the time that it would take at the pace of the slowest recent turns,
#: multiplied by this.
HUNG_FACTOR = 4.0

#: Seconds for the first turn, whose pace is not known.
FIRST_TURN = 60.0


class Watchdog:
    """Whether a turn takes so much longer than others that it may never end.

    `begin` and `end` are called by the thread that computes, `overdue` by any.

    Args:
        first_turn: seconds for the first turn.
        hung_after: seconds after which any later turn may count as hung.
    """

    def __init__(self, first_turn: float, hung_after: float) -> None:
        self._hung_after = hung_after
        self._allowed = first_turn
        self._began: float | None = None
        self._cost = 1
        #: Seconds per unit of cost in the slowest recent turns.
        self._slowest: float | None = None

    def begin(self, cost: int) -> None:
        """A turn begins that computes this much: tokens, or elements of images."""
        if self._slowest is not None:
            self._allowed = max(self._hung_after, HUNG_FACTOR * self._slowest * cost)
        self._cost = cost
        self._began = time.monotonic()

    def end(self) -> None:
        assert self._began is not None
        pace = (time.monotonic() - self._began) / self._cost
        self._slowest = max(0.9 * (self._slowest or 0.0), pace)
        self._began = None

    def overdue(self) -> float:
        """Seconds that the turn under way has taken if it counts as hung; else 0."""
        took = time.monotonic() - began if (began := self._began) is not None else 0.0
        return took if took > self._allowed else 0.0
