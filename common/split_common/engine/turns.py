"""Turns of members by how much is computed for each: start-time fair queueing.

Source: Goyal, Vin and Cheng, "Start-Time Fair Queueing", SIGCOMM 1996. In a step's place, there is a packet.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

from split_common.engine.steps import ScheduledStep

#: Most pending steps that begin together, and most numbers in them all, which they take until their forward has
#: ended. A single step may have more numbers.
MAX_TOGETHER = 16
MAX_WEIGHT = 128 * 1024**2

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
