"""Decides how many tokens each request drafts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from split_device.speculation.acceptance import Acceptance
from split_device.speculation.drafter import Drafter
from split_device.speculation.drafters import make_drafter
from split_device.speculation.names import AUTO
from split_device.speculation.recycle import Successors
from split_device.speculation.step_times import StepTimes

#: While drafts do not pay, one is tried after this many cycles at first, and after twice as many each further time.
FIRST_PROBE = 16
LAST_PROBE = 256

#: Tokens of a draft that is tried: with the one before it, it fills the least number of rows that is computed.
PROBE_TOKENS = 3

#: While fewer recent cycles than this had no drafts, one goes without: else it is unknown what drafts cost.
UNDRAFTED_CYCLES = 2.0

#: A draft has to promise this many times the tokens per second of none.
GAIN = 1.02


class Cycle(NamedTuple):
    """What was under way when a decoding step began."""

    #: By the clock of the `Pace`.
    began: float
    #: Number of requests that had steps, number of tokens in these, and whether some were drafts.
    rows: int
    tokens: int
    drafted: bool


class Pace:
    """What all requests of one generator have learned together. Not thread-safe.

    Args:
        longest: most tokens of a draft.
        clock: the time in seconds.
    """

    def __init__(self, longest: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.longest = longest
        self.clock = clock
        self.times = StepTimes()
        #: Cycles between two drafts that are tried, and until the next one.
        self.probe_after = self.until_probe = float(FIRST_PROBE)
        self.acceptance = Acceptance(longest)
        self.successors = Successors()

    def start(self, name: str) -> Speculation:
        """Speculation for one request, by a drafter of this name or `auto`. Raises ConfigError."""
        return Speculation(self, make_drafter(name, self.successors), name == AUTO)


class Speculation:
    """The drafter of one request, and how many tokens it drafts. One thread uses it.

    Args:
        pace: what is known from all requests.
        drafter: drafts for this request alone.
        measures: whether to draft as many tokens as pay. If not, it drafts as many as may be.
    """

    def __init__(self, pace: Pace, drafter: Drafter, measures: bool) -> None:
        self._pace, self._drafter, self._measures = pace, drafter, measures
        self._acceptance = Acceptance(pace.longest, pace.acceptance)
        #: What was under way when its decoding step began; None if there is no such step.
        self.cycle: Cycle | None = None
        #: Most tokens of later drafts.
        self.limit = pace.longest

    def extend(self, tokens: Sequence[int]) -> None:
        """Goes on after these tokens: those of the prompt first."""
        self._drafter.extend(tokens)

    def checked(self, begun: int, tokens: Sequence[int], logits: torch.Tensor, accepted: int) -> None:
        """A step is through.

        Args:
            begun: number of tokens that it had beside its draft.
            tokens: the last of these, and the draft.
            logits: float32 `[tokens, vocabulary]`, as for `Drafter.learn`.
            accepted: how many tokens of the draft were right.
        """
        drafted = len(tokens) - 1
        if (cycle := self.cycle) is not None:
            seconds, share = self._pace.clock() - cycle.began, (begun + drafted) / cycle.tokens
            self._pace.times.observe(cycle.rows, cycle.tokens, cycle.drafted, seconds, share)
            self.cycle = None
        if drafted:
            self._acceptance.record(drafted, accepted)
        self._drafter.learn(tokens, logits)

    def draft(self, begun: int, limit: int, rows: int, others: int = 0) -> list[int]:
        """Drafts for a step.

        Args:
            begun: number of tokens that the step has beside the draft.
            limit: most tokens of the draft.
            rows: number of requests that decode.
            others: number of tokens in the drafts of the others.
        """
        limit = min(limit, self.limit)
        if not self._measures or limit <= 0:
            return self._drafter.draft(limit) if limit > 0 else []
        pace = self._pace
        length = self._length(begun, rows)
        probes = not length
        if probes:
            pace.until_probe -= 1 / rows
            length = PROBE_TOKENS if pace.until_probe <= 0 else 0
        # Twice as many as were measured, and not more: what steps cost is known from those that were.
        limit = min(limit, length, int(2 * pace.times.widest) + PROBE_TOKENS - others)
        draft = self._drafter.draft(limit) if limit > 0 else []
        if draft:
            pace.probe_after = min(LAST_PROBE, 2 * pace.probe_after) if probes else FIRST_PROBE
            pace.until_probe = pace.probe_after
        return draft

    def _length(self, begun: int, rows: int) -> int:
        """How many tokens of drafts pay, if all requests draft as many; 0 if none do."""
        times = self._pace.times
        if times.undrafted < UNDRAFTED_CYCLES:
            return 0
        best, best_speed = 0, 0.0
        expected, all_right = 1.0, 1.0
        for length, chance in enumerate([1.0, *self._acceptance.chances()]):
            all_right *= chance
            expected += all_right if length else 0.0
            seconds = times.seconds(rows, rows * (begun + length))
            assert seconds is not None
            speed = expected / seconds / (GAIN if length else 1.0)
            if speed > best_speed:
                best, best_speed = length, speed
        return best
