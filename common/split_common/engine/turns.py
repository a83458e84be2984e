"""Turns of members by how much is computed for each: start-time fair queueing, and shares of prefill.

Source: Goyal, Vin and Cheng, "Start-Time Fair Queueing", SIGCOMM 1996. In a step's place, there is a packet.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

from split_common.engine.steps import ScheduledStep

#: Most pending steps that begin together, and most numbers in them all, which they take until their forward has
#: ended. A single step may have more numbers.
MAX_TOGETHER = 16
MAX_WEIGHT = 128 * 1024**2

#: Seconds of prefill that a member may have beyond its share of the time.
PREFILL_BURST = 2.0

_Step = TypeVar("_Step", bound=ScheduledStep[Any, Any])


class FairTurns:
    """Gives each step a tag; steps with lower tags go first. Not thread-safe.

    A member's next step starts where its last one ends, in units of cost, so that a member with many or costly
    steps gets higher tags than others. A member that was away starts at the present: the past gives it no claim.
    """

    def __init__(self) -> None:
        #: The highest tag of a step that went: the present.
        self._now = 0.0
        #: Where the last step of each member ends.
        self._ends: dict[Hashable, float] = {}

    def tag(self, member: Hashable, cost: float) -> float:
        """The tag of a member's next step, which costs `cost`."""
        begin = max(self._now, self._ends.get(member, 0.0))
        self._ends[member] = begin + cost
        return begin

    def went(self, tag: float) -> None:
        """Notes that the step with this tag goes into a forward."""
        if tag > self._now:
            self._now = tag
            self._ends = {member: end for member, end in self._ends.items() if end > tag}


class PrefillShares:
    """How far members' prefill exceeds their share of the time, which is equal for all: a leaky bucket for each.

    A member alone has all of the time for its share, and so no debts. Not thread-safe. Times are in seconds.
    """

    def __init__(self) -> None:
        # By member: the seconds of prefill that its share has not paid for yet, and the time at which this was so.
        self._debts: dict[Hashable, tuple[float, float]] = {}

    def charge(self, prefill: Mapping[Hashable, float], members: int, began: float, now: float) -> None:
        """Counts the prefill of a forward.

        A member owes a long one to the end, however long it took. Of many short ones, for which others do not wait
        long, it owes `2 * PREFILL_BURST` at most.

        Args:
            prefill: how long each member had of it.
            members: how many there are.
            began, now: when the forward began and ended.
        """
        for member, seconds in prefill.items():
            debt, since = self._debts.get(member, (0.0, began))
            left = debt - (now - since) / max(1, members)
            most = max(left, seconds, 2 * PREFILL_BURST)
            self._debts[member] = max(0.0, min(left + seconds, most)), now

    def over(self, members: int, now: float) -> dict[Hashable, float]:
        """Which of several members have had more than their share by `PREFILL_BURST`, and what each owes.

        Forgets paid debts.
        """
        paid = {member: debt - (now - since) / max(1, members) for member, (debt, since) in self._debts.items()}
        self._debts = {member: (debt, now) for member, debt in paid.items() if debt > 0}
        return {member: debt for member, debt in paid.items() if debt > PREFILL_BURST}


def next_few(pending: Iterable[_Step]) -> list[_Step]:
    """Which pending steps begin next, so that their forward does not take long.

    If several members have steps, it is as many of each as weigh about the same.
    """
    steps = sorted(pending, key=lambda step: step.turn)[:MAX_TOGETHER]
    if len({step.member for step in steps}) > 1:
        end = min(step.turn + step.weight for step in steps)
        steps = [step for step in steps if step.turn < end]
    few: list[_Step] = []
    left = float(MAX_WEIGHT)
    for step in steps:
        left -= step.weight
        if few and left < 0:
            break
        few.append(step)
    return few
