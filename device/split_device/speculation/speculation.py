"""Decides how many tokens each request drafts."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from split_device.speculation.acceptance import Acceptance
from split_device.speculation.drafter import Drafter, TreeDrafter
from split_device.speculation.drafters import has_branches, make_drafter
from split_device.speculation.names import AUTO
from split_device.speculation.recycle import Successors
from split_device.speculation.room import FREE, ROOMS, Room
from split_device.speculation.step_times import StepTimes
from split_device.speculation.tree import DraftTree

#: The share of all time that drafts may lose, beside what they have gained.
ALLOWANCE = 0.01

#: What they may lose before that, and the most that is saved up for later losses, in cycles without drafts.
FIRST_ALLOWANCE = 0.25
MOST_ALLOWANCE = 8.0

#: While drafts do not pay, one is tried after this many cycles at first, and after twice as many each further time.
FIRST_PROBE = 4
LAST_PROBE = 256

#: Tokens of a draft that is tried: with the one before it, it fills the least number of rows that is computed.
PROBE_TOKENS = 3

#: While fewer recent cycles than this had no drafts, one goes without: else it is unknown what drafts cost.
UNDRAFTED_CYCLES = 2.0

#: A draft has to promise this many times the tokens per second of none.
GAIN = 1.03

#: Longer drafts are not looked at when all their tokens are right with a smaller chance than this.
LEAST_CHANCE = 0.02


class Cycle(NamedTuple):
    """What was under way when a decoding step began."""

    #: By the clock of the `Pace`.
    began: float
    #: Number of requests that had steps, number of tokens in these, and whether some were drafts.
    rows: int
    tokens: int
    drafted: bool
    #: Number of tokens that the steps had room for, beyond those that they had.
    padding: int = 0
    #: How many it would be without drafts: the room of steps with a grammar or a named drafter is no choice.
    fixed_padding: int = 0


class Pace:
    """What all requests of one generator have learned together. Not thread-safe.

    Args:
        longest: most tokens of a draft.
        clock: the time in seconds.
        pads: whether steps are padded, to a size that it chooses for requests that draft as many tokens as pay.
    """

    def __init__(self, longest: int, clock: Callable[[], float] = time.monotonic, pads: bool = False) -> None:
        self.longest = longest
        self.clock = clock
        self.times = StepTimes()
        #: How much room steps have; None if their sizes follow their tokens.
        self.room = Room() if pads else None
        #: Seconds that drafts may still lose; None before it is known how long a cycle is.
        self.allowance: float | None = None
        #: Cycles between two drafts that are tried, and until the next one.
        self.probe_after = self.until_probe = float(FIRST_PROBE)
        #: Whether drafts pay, as far as is known.
        self.pays = True
        self.acceptance = Acceptance(longest)
        self.successors = Successors()

    def start(self, drafter: str | Drafter) -> Speculation:
        """Speculation for one request, by a drafter, by one of this name, or by `auto`. Raises ConfigError."""
        own = make_drafter(drafter, self.successors) if isinstance(drafter, str) else drafter
        return Speculation(self, own, drafter == AUTO, branches=has_branches(drafter))

    def stepped(self, cycle: Cycle, tokens: int, accepted: int, measures: bool) -> None:
        """A request's step is through.

        Args:
            cycle: when it began.
            tokens: number of its tokens.
            accepted: how many of its drafted tokens were right.
            measures: whether it drafts as many tokens as pay. What others lose, they were asked to.
        """
        weight, slowdowns, rows = tokens / cycle.tokens, self.times.slowdowns, cycle.rows
        took = self.clock() - cycle.began
        # Padding that is always there is no choice.
        padding = cycle.padding if self.room is not None else 0
        seconds = self.times.observe(rows, cycle.tokens, cycle.drafted, took, weight, padding)
        if self.room is not None:
            self.room.stepped(weight)
            if self.times.slowdowns > slowdowns:
                self.room.look_again()
        alone = self.times.seconds(rows, rows)
        if alone is None or not measures:
            return
        if self.allowance is None:
            self.allowance = FIRST_ALLOWANCE * alone
        gained = ALLOWANCE * seconds
        if cycle.drafted or padding > cycle.fixed_padding:
            padded = plain = alone
            if self.room is not None:
                plain = self.times.seconds(rows, rows, cycle.fixed_padding) or alone
                padded = self.times.seconds(rows, rows, cycle.tokens + padding - rows) or alone
            # What padding costs is no loss while it is hardly anything.
            gained += min(padded, FREE * plain) * (1 + accepted) - seconds
        most = MOST_ALLOWANCE * alone
        self.allowance = max(-most, min(self.allowance + gained / rows, most))


class Speculation:
    """The drafter of one request, and how many tokens it drafts. One thread uses it.

    Args:
        pace: what is known from all requests.
        drafter: drafts for this request alone.
        measures: whether to draft as many tokens as pay. If not, it drafts as many as may be.
        on_end: called when the request has ended.
        branches: whether to draft several continuations where a step may have them.
    """

    def __init__(
        self,
        pace: Pace,
        drafter: Drafter,
        measures: bool,
        on_end: Callable[[], None] = lambda: None,
        branches: bool = False,
    ) -> None:
        self._pace, self._drafter, self._measures, self._on_end = pace, drafter, measures, on_end
        # A draft that there was no room for, and how many of its tokens came.
        self._imagined: list[int] = []
        self._came = 0
        #: Whether `tree` drafts more than one continuation.
        self.branches = branches
        # Whether the draft under way is of `tree`, whose tokens were not all tried.
        self._in_tree = False
        #: The next draft: the most tokens of it, and whether it is tried only; None if that is not chosen.
        self._planned: tuple[int, bool] | None = None
        self._acceptance = Acceptance(pace.longest, pace.acceptance)
        #: Seconds of the pace's allowance that its draft under way may cost.
        self._stake = 0.0
        #: What was under way when its decoding step began; None if there is no such step.
        self.cycle: Cycle | None = None
        #: Most tokens of later drafts.
        self.limit = pace.longest

    def extend(self, tokens: Sequence[int]) -> None:
        """Goes on after these tokens: those of the prompt first."""
        self._drafter.extend(tokens)
        for token in tokens if self._imagined else ():
            if right := token == self._imagined[self._came]:
                self._came += 1
            if not right or self._came == len(self._imagined):
                self._acceptance.record(len(self._imagined), self._came)
                self._imagined, self._came = [], 0
                break

    def checked(self, begun: int, tokens: Sequence[int], logits: torch.Tensor, accepted: int) -> None:
        """A step is through.

        Args:
            begun: number of tokens that it had beside its draft.
            tokens: the last of these, and the draft.
            logits: float32 `[tokens, vocabulary]`, as for `Drafter.learn`.
            accepted: how many tokens of the draft were right.
        """
        drafted = len(tokens) - 1
        self._bet(0.0)
        if self.cycle is not None:
            self._pace.stepped(self.cycle, begun + drafted, accepted, self._measures)
            if self._measures and self._pace.room is not None and self._pace.room.due:
                self._choose_room(self._pace.room, self.cycle.rows)
            self.cycle = None
        if drafted and not self._in_tree:
            self._acceptance.record(drafted, accepted)
        self._in_tree = False
        self._drafter.learn(tokens, logits)

    def ended(self) -> None:
        """The request has ended, maybe while a draft was under way, which costs nothing any more."""
        self._bet(0.0)
        self._on_end()

    def plan(self, begun: int, limit: int, rows: int, others: int = 0) -> int:
        """Chooses how many tokens the next draft has at most, before `draft` is called with the same arguments."""
        self._planned = self._choose(begun, limit, rows, others)
        return self._planned[0]

    def draft(self, begun: int, limit: int, rows: int, others: int = 0) -> list[int]:
        """Drafts for a step.

        Args:
            begun: number of tokens that the step has beside the draft.
            limit: most tokens of the draft.
            rows: number of requests that decode.
            others: number of tokens in the drafts of the others.
        """
        limit, probes = self._planned or self._choose(begun, limit, rows, others)
        self._planned = None
        draft = self._drafter.draft(limit) if limit > 0 else []
        pace = self._pace
        if pace.room is not None and pace.room.tokens == 1 and self._measures and not self._imagined:
            # How well drafts fit is known without them: what would they have been?
            self._imagined, self._came = self._drafter.draft(PROBE_TOKENS), 0
        if draft and self._measures:
            self._imagined = []
            self._bet(self._loss(len(draft), rows, rows + others))
            pace.pays = not probes or pace.probe_after <= FIRST_PROBE
            pace.probe_after = min(LAST_PROBE, 2 * pace.probe_after) if probes else FIRST_PROBE
            pace.until_probe = pace.probe_after
        return draft

    def _choose(self, begun: int, limit: int, rows: int, others: int) -> tuple[int, bool]:
        """The most tokens of the next draft, and whether it is only tried, because none pays."""
        limit = min(limit, self.limit)
        if not self._measures or limit <= 0:
            return max(0, limit), False
        pace = self._pace
        length = self._length(begun, rows)
        probes = not length
        if probes:
            pace.until_probe -= 1 / rows
            length = PROBE_TOKENS if pace.until_probe <= 0 else 0
        # Twice as many as were measured, and not more: what steps cost is known from those that were.
        limit = min(limit, length, int(2 * pace.times.widest) + 1 - others)
        return max(0, self._affordable(limit, rows, rows + others)), probes

    def tree(self, limit: int) -> DraftTree:
        """Drafts at most `limit` tokens in several continuations for a step."""
        assert isinstance(self._drafter, TreeDrafter)
        limit = min(limit, self.limit)
        self._in_tree = limit > 0
        return self._drafter.draft_tree(limit) if limit > 0 else DraftTree()

    def chance(self, length: int) -> float:
        """The chance that all tokens of a draft of this length are right."""
        return math.prod(itertools.islice(self._acceptance.chances(), length))

    def ahead(self, known: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens behind those that are drafted already; none if others would be drafted now."""
        draft = self._drafter.draft(len(known) + limit) if limit > 0 else []
        return draft[len(known) :] if draft[: len(known)] == [*known] else []

    def _bet(self, stake: float) -> None:
        """Takes from the allowance what the draft may cost, instead of what an earlier one might have."""
        if self._pace.allowance is not None:
            self._pace.allowance += self._stake - stake
            self._stake = stake

    def _seconds(self, rows: int, tokens: int, room: int | None = None) -> float | None:
        """How long a cycle takes with the padding that there is, or with so much room for each request."""
        if room is None:
            room = self._pace.room.tokens if self._pace.room is not None else 0
        return self._pace.times.seconds(rows, tokens, max(0, rows * room - tokens))

    def _loss(self, length: int, rows: int, tokens: int) -> float:
        """Seconds that a draft adds to a cycle that has so many tokens without it."""
        longer, without = self._seconds(rows, tokens + length), self._seconds(rows, tokens)
        return longer - without if longer is not None and without is not None else 0.0

    def _affordable(self, length: int, rows: int, tokens: int) -> int:
        """Most tokens of a draft that may all be wrong: the allowance pays for them."""
        allowance = self._pace.allowance
        if allowance is None:
            return 0
        while length > 0 and self._loss(length, rows, tokens) > allowance:
            length -= 1
        return length

    def _length(self, begun: int, rows: int) -> int:
        """How many tokens of drafts pay, if all requests draft as many; 0 if none do."""
        alone = self._seconds(rows, rows * begun)
        if self._pace.times.undrafted < UNDRAFTED_CYCLES or alone is None:
            return 0
        return self._fastest(begun, rows, None, self._acceptance, GAIN / alone)[0]

    def _fastest(
        self, begun: int, rows: int, room: int | None, acceptance: Acceptance, least: float
    ) -> tuple[int, float]:
        """The number of drafted tokens that promises most tokens per second, and these; 0 if that is `least`."""
        best, best_speed = 0, least
        expected = all_right = 1.0
        for length, chance in enumerate(acceptance.chances(), 1):
            all_right *= chance
            if all_right < LEAST_CHANCE or (room is not None and begun + length > room):
                break
            expected += all_right
            seconds = self._seconds(rows, rows * (begun + length), room)
            assert seconds is not None
            if expected / seconds > best_speed:
                best, best_speed = length, expected / seconds
        return best, best_speed

    def _choose_room(self, room: Room, rows: int) -> None:
        """Chooses the size of the next steps of all requests."""
        acceptance = self._acceptance if rows == 1 else self._pace.acceptance
        plain: dict[int, float] = {}
        speeds: dict[int, float] = {}
        for tokens in ROOMS:
            if (seconds := self._seconds(rows, rows, tokens)) is None:
                return
            plain[tokens] = seconds
            speeds[tokens] = self._fastest(1, rows, tokens, acceptance, 1 / seconds)[1]
        room.choose(plain, speeds, self._pace.allowance or 0.0)
