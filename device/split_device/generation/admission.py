"""Admission of requests: which one begins next, and whether head and tail have memory for it."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Set
from typing import NamedTuple

from split_device.generation.request import Generation
from split_device.generation.sampling import Sampler
from split_device.generation.stage import Stage

#: One place in this many is kept for requests of a priority above 0; and one in this many from further choices, all
#: of a request's but its first one, so that requests with many do not hold up the others.
PRIORITY_SHARE = 8

#: Seconds for which no request with an adapter begins after the workers that have it were full.
NO_ROOM_RETRY = 1.0


#: Minus its priority, its place in the order of coming, and the request.
_Waiting = tuple[int, int, Generation, Sampler]


class Admitted(NamedTuple):
    """A request that may begin, and the memory that is reserved for it in head and tail."""

    generation: Generation
    sampler: Sampler
    costs: tuple[int, int]


class Admission:
    """The requests that wait to begin: those of the highest priority first, and of these the oldest.

    A request begins when head and tail have memory for all tokens that it may come to. Those of an adapter whose
    workers were full are passed over for a while. Without an adapter any worker would do: then none begins. Further
    choices are passed over while they have all places that they may have. Not thread-safe.

    Args:
        head, tail: where memory is reserved.
        max_requests: how many may run at once.
    """

    def __init__(self, head: Stage, tail: Stage, max_requests: int) -> None:
        self._head, self._tail = head, tail
        self._places = max_requests
        self._kept_free = max_requests // PRIORITY_SHARE
        #: A heap.
        self._waiting: list[_Waiting] = []
        self._order = itertools.count()
        #: When pauses end, by the adapter's name.
        self._paused_until: dict[str | None, float] = {}

    def add(self, generation: Generation, sampler: Sampler) -> None:
        """Makes a request wait. One that has begun before has its old place, before those that came after it."""
        if generation.place is None:
            generation.place = next(self._order)
        heapq.heappush(self._waiting, (-generation.request.priority, generation.place, generation, sampler))

    def pause(self, adapter: str | None) -> None:
        """Lets no request with this adapter begin for `NO_ROOM_RETRY`; with None, no request at all."""
        self._paused_until[adapter] = time.monotonic() + NO_ROOM_RETRY

    @property
    def pause_ends(self) -> list[float]:
        """When pauses end, by `time.monotonic`; some have ended. Empty if no request waits."""
        return [*self._paused_until.values()] if self._waiting else []

    def waiting(self) -> list[Generation]:
        return [generation for *_, generation, _ in self._waiting]

    def admit(
        self, active: int, now: float, full: Set[str | None] = frozenset(), further: int = 0
    ) -> Admitted | None:
        """Takes out the next request and reserves its memory; None if it has to wait, or there is none.

        Args:
            active: the number of requests that run.
            full: adapters for which requests that run wait for room on workers.
            further: how many of those that run are further choices.
        """
        while self._waiting and self._waiting[0][2].done:
            heapq.heappop(self._waiting)
        blocked = full | {adapter for adapter, until in self._paused_until.items() if now < until}
        if not self._waiting or None in blocked:
            return None
        crowded = further >= self._places - self._kept_free
        entry = self._first(lambda each: each.adapter_name not in blocked and not (crowded and is_further(each)))
        if entry is None:
            return None
        *_, generation, sampler = entry
        kept_free = self._kept_free if generation.request.priority <= 0 else 0
        costs = self._head.cost(sampler.max_length), self._tail.cost(sampler.max_length)
        fits = costs[0] <= self._head.unreserved and costs[1] <= self._tail.unreserved
        if not fits or active >= self._places - kept_free:
            return None
        if entry is self._waiting[0]:
            heapq.heappop(self._waiting)
        else:
            self._waiting.remove(entry)
            heapq.heapify(self._waiting)
        self._head.unreserved -= costs[0]
        self._tail.unreserved -= costs[1]
        return Admitted(generation, sampler, costs)

    def _first(self, may_begin: Callable[[Generation], bool]) -> _Waiting | None:
        """The first request that waits of those that may begin."""
        if may_begin(self._waiting[0][2]):
            return self._waiting[0]
        return min((each for each in self._waiting if not each[2].done and may_begin(each[2])), default=None)

    def release(self, costs: tuple[int, int]) -> None:
        """Frees the memory that was reserved for a request."""
        self._head.unreserved += costs[0]
        self._tail.unreserved += costs[1]


def is_further(generation: Generation) -> bool:
    """Whether it is one of a request's choices, and not the first."""
    return generation.request.index > 0
