"""Shares of members in something that a worker or the queue has too little of.

Nobody is held to a share while nobody else waits. Once several members compete, each gets what it asks for up to a
level that is the same for all: max-min fairness (Bertsekas and Gallager, Data Networks, section 6.5.2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

_T = TypeVar("_T")


def max_min_level(demands: Iterable[float], capacity: float) -> float:
    """The most that one member gets of a capacity, if every member gets the lesser of its demand and this level.

    Args:
        demands: what each member asks for, in the unit of `capacity`.
        capacity: what there is.

    Returns:
        Infinity if all demands fit together.
    """
    left, asked = capacity, sorted(demands)
    for served, demand in enumerate(asked):
        level = left / (len(asked) - served)
        if demand > level:
            return level
        left -= demand
    return float("inf")


def newest_of_largest(items: Iterable[_T], owner: Callable[[_T], Hashable]) -> _T:
    """Of the owner who has the most items, the last one. There is at least one item."""
    by_owner: dict[Hashable, list[_T]] = {}
    for item in items:
        by_owner.setdefault(owner(item), []).append(item)
    return max(by_owner.values(), key=len)[-1]


class Usage:
    """How much each member uses, in one unit. Not locked: its owner's lock guards it."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}
        self.total = 0

    def add(self, member: str, amount: int) -> None:
        """Adds to what a member uses; a negative amount gives back."""
        self.total += amount
        if left := self._used.get(member, 0) + amount:
            self._used[member] = left
        else:
            self._used.pop(member, None)

    def __getitem__(self, member: str) -> int:
        return self._used.get(member, 0)

    def __iter__(self) -> Iterator[str]:
        """The members that use something."""
        return iter(self._used)

    def of_all(self) -> Mapping[str, int]:
        """What each member uses; those that use nothing are left out."""
        return self._used

    def largest(self) -> str | None:
        """The member that uses most; None if nobody uses anything."""
        return max(self._used, key=self._used.__getitem__, default=None)

    def level(self, capacity: int, member: str, amount: int) -> float:
        """The max-min level of a capacity if a member uses `amount` more than it does."""
        wanted = dict(self._used)
        wanted[member] = wanted.get(member, 0) + amount
        return max_min_level(wanted.values(), capacity)


class TokenBucket:
    """Admits `rate` events a second on average, and at most `burst` at once. Not locked."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._since = time.monotonic()

    def take(self, amount: float = 1.0) -> bool:
        """Takes `amount` tokens if they are there; returns whether they were."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._since) * self._rate)
        self._since = now
        if self._tokens < amount:
            return False
        self._tokens -= amount
        return True


class TokenBuckets:
    """A `TokenBucket` of the same rate and burst for each member. Not locked."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: dict[str, TokenBucket] = {}

    def take(self, member: str, amount: float = 1.0) -> bool:
        """Takes `amount` tokens of a member's if they are there; returns whether they were."""
        bucket = self._buckets.get(member)
        if bucket is None:
            bucket = self._buckets[member] = TokenBucket(self._rate, self._burst)
        return bucket.take(amount)

    def keep(self, members: Container[str]) -> None:
        """Forgets the buckets of all other members."""
        self._buckets = {member: bucket for member, bucket in self._buckets.items() if member in members}
