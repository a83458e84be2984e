"""The steps of a request that are away at once, as the generator sees them."""

from __future__ import annotations

import itertools
from collections import deque

import torch

from split_common.errors import SessionLost
from split_device.models.flight import Landed, Leg


class Legs:
    """The decoding steps of a request that sends them ahead. The generator's thread uses it.

    The first one begins with tokens of the text, the others with drafted ones.
    """

    def __init__(self) -> None:
        #: Steps that are not checked, in their order, and the tokens of each.
        self._open: deque[tuple[Leg, list[int]]] = deque()
        #: Steps that have not left for the session's thread.
        self._unsent: deque[Leg] = deque()
        #: Outputs that came before it was known whether their steps begin right.
        self._early: dict[Leg, torch.Tensor] = {}
        #: How many the session's thread has not given back.
        self.away = 0

    def __len__(self) -> int:
        """How many steps are not checked."""
        return len(self._open)

    @property
    def steps(self) -> list[list[int]]:
        """The tokens of these steps."""
        return [tokens for _, tokens in self._open]

    @property
    def unsent(self) -> int:
        """How many of them have not left."""
        return len(self._unsent)

    @property
    def sent(self) -> torch.Tensor | None:
        """The states `[tokens, width]` of the first one; None if it has not left."""
        return None if self.first is None or self.first in self._unsent else self.first.states

    @property
    def first(self) -> Leg | None:
        """The step whose output is waited for, or is in the tail."""
        return self._open[0][0] if self._open else None

    def add(self, start: int, tokens: list[int], room: int) -> None:
        """Adds a step that enters the head."""
        leg = Leg(start, len(tokens), not self._open, room)
        self._open.append((leg, tokens))
        self._unsent.append(leg)

    def leaves(self, states: torch.Tensor) -> Leg:
        """The next step, with the states `[tokens, width]` that have left the head for it."""
        leg = self._unsent.popleft()
        leg.states = states
        self.away += 1
        return leg

    def returned(self, leg: Leg, output: torch.Tensor) -> bool:
        """A step is back. Returns whether it is the first one; if not, its output is kept until it is."""
        if leg.void:
            return False
        if leg is self.first:
            return True
        self._early[leg] = output
        return False

    def landed(self, landed: Landed) -> Exception | None:
        """A flight is over. Later steps that were lost are void. Returns why, if the first one was lost."""
        self.away -= landed.legs
        if self.first in landed.lost:
            return landed.error or SessionLost("a step was given up with the one in front of it")
        behind = itertools.dropwhile(lambda leg: leg not in landed.lost, [leg for leg, _ in self._open])
        for leg in reversed([*behind]):
            leg.void = True
        return None

    def go_on(self, token: int) -> bool:
        """All tokens of the first step were right. Goes on with the second one, if that begins with this token."""
        if len(self._open) < 2 or self._open[1][0].void or self._open[1][1][0] != token:
            return False
        self._open.popleft()
        return True

    def take_early(self) -> torch.Tensor | None:
        """The output of the first step, if it is here already."""
        return None if self.first is None else self._early.pop(self.first, None)

    def drop(self) -> int:
        """Gives up all steps: what comes back of them is void. Returns how many tokens were in those sent ahead."""
        ahead = sum(map(len, self.steps[1:]))
        # The last one first: the session's thread must not see one behind another that is void already.
        for leg, _ in reversed(self._open):
            leg.void = True
        for each in (self._open, self._unsent, self._early):
            each.clear()
        return ahead
