"""Decides for how many tokens padded steps have room: padding costs bytes, and bytes may cost time."""

from __future__ import annotations

from collections.abc import Mapping

#: The tokens for which a step may have room.
ROOMS = (1, 4, 16)

#: Cycles of one token each with which a process begins: those that load things, and two that are measured.
FIRST_CYCLES = 4.0

#: Least cycles with more room than before, which measure what that costs.
TRIAL = 1.0

#: A choice is for at most this many times the cycles that had as much room before.
CAUTION = 2.0

#: Most cycles until the next choice, and those with one token that measure again what they take.
STRETCH = 32.0
REFRESH = 1.0

#: Cycles of one token until the next choice.
RETRY = 8.0

#: Room that makes cycles longer by no more than this factor is taken in any case: sizes then say nothing at all.
FREE = 1.015

#: Drafts in more room have to promise this many times the tokens per second of steps with one token.
GAIN = 1.03


class Room:
    """The tokens for which the padded steps of all `auto` requests of a generator have room. Not thread-safe.

    It stays the same for stretches of cycles, whose lengths are known when they begin. The account of what drafts
    may lose pays for each stretch as if all of its drafts were wrong.
    """

    def __init__(self) -> None:
        self.tokens = ROOMS[0]
        self._left = FIRST_CYCLES
        #: Cycles with each room so far, and since steps had one token.
        self._cycles = dict.fromkeys(ROOMS, 0.0)
        self._since_one = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for a choice."""
        return self._left <= 0

    def stepped(self, weight: float) -> None:
        """A cycle has passed, or this share of one."""
        self._left -= weight
        self._cycles[self.tokens] += weight
        self._since_one = 0.0 if self.tokens == 1 else self._since_one + weight

    def look_again(self) -> None:
        """Cycles have become longer. Whether padding is the reason shows without it."""
        if self.tokens > 1:
            self._left, self._since_one = 0.0, STRETCH

    def choose(self, plain: Mapping[int, float], speeds: Mapping[int, float], allowance: float) -> None:
        """Chooses how much room there is from now on.

        Args:
            plain: for each of `ROOMS`, seconds of a cycle with so much room and no drafts.
            speeds: for each of them, the most tokens per second that drafts promise, or those of none if that is
                more.
            allowance: seconds that drafts may lose.
        """
        if self._since_one >= STRETCH:
            self.tokens, self._left = 1, REFRESH
            return
        one = plain[1]
        free = [room for room in ROOMS if plain[room] <= FREE * one]
        widest = max(room for room, passed in self._cycles.items() if passed)
        #: Cycles for which there may be so much room: at most one step more than what was tried.
        cycles = {
            room: STRETCH if room in free else min(STRETCH, allowance / (plain[room] - one))
            for room in ROOMS[: ROOMS.index(widest) + 2]
        }
        rooms = [room for room, most in cycles.items() if most >= TRIAL]
        best = max(rooms, key=lambda room: speeds[room])
        if tries := speeds[best] < GAIN / one:
            # Padding may cost less than it did: what would drafts promise if it cost nothing?
            hopeful = speeds[ROOMS[1]] * plain[ROOMS[1]] >= GAIN
            best = ROOMS[1] if hopeful and ROOMS[1] in rooms else 1
        best = max([best, *(room for room in free if room in rooms)])
        known = max(TRIAL, CAUTION * self._cycles[best])
        self.tokens = best
        self._left = RETRY if best == 1 else TRIAL if tries and best not in free else min(cycles[best], known)
