"""The CPU time of slow grammars in a turn of the generator: many of them do not hold up other requests."""

from __future__ import annotations

import time
from typing import Self

#: Seconds of CPU time for each of three kinds of work in a turn: beginning requests; finding out what may come
#: next; and accepting tokens, with those that are forced or were drafted. What is left is done in later turns. A
#: slow grammar takes some 10 ms of it at once.
TURN_SECONDS = 0.05


class TurnTime:
    """CPU time of this thread that is spent within `with` blocks, one after the other."""

    def __init__(self) -> None:
        self._left = TURN_SECONDS
        self._began = 0.0

    def __enter__(self) -> Self:
        self._began = time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._left -= time.thread_time() - self._began

    @property
    def over(self) -> bool:
        """Whether all of it is spent, asked within a block."""
        return time.thread_time() - self._began >= self._left
