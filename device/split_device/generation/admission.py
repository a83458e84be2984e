"""Admission of requests: which one begins next, and whether head and tail have memory for it."""

from __future__ import annotations

import heapq
import itertools
import time
from typing import NamedTuple

from split_device.generation.request import Generation
from split_device.generation.sampling import Sampler
from split_device.generation.stage import Stage

#: One place in this many is kept for requests of a priority above 0.
PRIORITY_SHARE = 8

#: Seconds for which no request begins after workers were full.
NO_ROOM_RETRY = 1.0


class Admitted(NamedTuple):
    """A request that may begin, and the memory that is reserved for it in head and tail."""

    generation: Generation
    sampler: Sampler
    costs: tuple[int, int]


class Admission:
    """The requests that wait to begin: those of the highest priority first, and of these the oldest.

    A request begins when head and tail have memory for all tokens that it may come to. Not thread-safe.

    Args:
        head, tail: where memory is reserved.
        max_requests: how many may run at once.
    """

    def __init__(self, head: Stage, tail: Stage, max_requests: int) -> None:
        self._head, self._tail = head, tail
        self._places = max_requests
        self._kept_free = max_requests // PRIORITY_SHARE
        #: A heap.
        self._waiting: list[tuple[int, int, Generation, Sampler]] = []
        self._order = itertools.count()
        self._paused_until = 0.0

    def add(self, generation: Generation, sampler: Sampler) -> None:
        """Makes a request wait. One that has begun before has its old place, before those that came after it."""
        if generation.place is None:
            generation.place = next(self._order)
        heapq.heappush(self._waiting, (-generation.request.priority, generation.place, generation, sampler))

    def pause(self) -> None:
        """Lets no request begin for `NO_ROOM_RETRY`."""
        self._paused_until = time.monotonic() + NO_ROOM_RETRY

    @property
    def resumes_at(self) -> float | None:
        """When the latest pause ends, by `time.monotonic`; None if no request waits."""
        return self._paused_until if self._waiting else None

    def waiting(self) -> list[Generation]:
        return [generation for *_, generation, _ in self._waiting]

    def admit(self, active: int, now: float) -> Admitted | None:
        """Takes out the next request and reserves its memory; None if it has to wait, or there is none.

        Args:
            active: the number of requests that run.
        """
        while self._waiting and now >= self._paused_until:
            *_, generation, sampler = self._waiting[0]
            if generation.done:
                heapq.heappop(self._waiting)
                continue
            kept_free = self._kept_free if generation.request.priority <= 0 else 0
            costs = self._head.cost(sampler.max_length), self._tail.cost(sampler.max_length)
            fits = costs[0] <= self._head.unreserved and costs[1] <= self._tail.unreserved
            if not fits or active >= self._places - kept_free:
                return None
            heapq.heappop(self._waiting)
            self._head.unreserved -= costs[0]
            self._tail.unreserved -= costs[1]
            return Admitted(generation, sampler, costs)
        return None

    def release(self, costs: tuple[int, int]) -> None:
        """Frees the memory that was reserved for a request."""
        self._head.unreserved += costs[0]
        self._tail.unreserved += costs[1]
