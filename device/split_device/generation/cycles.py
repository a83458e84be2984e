"""Measures cycles of a generator: how long steps of so many tokens, of so many sessions at once, really take."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from split_common.errors import MeasurementTimeout
from split_device.generation.generator import Generation, Generator, Request
from split_device.generation.settings import NO_END
from split_device.speculation.names import OFF
from split_device.speculation.tree import DraftTree

#: Seconds between two looks at whether a request has failed.
GLANCE = 0.1

#: Most tokens of a session's prompt: those of many sessions would take longer than what is measured.
PROMPT = 64

#: Tokens that a request may have beyond its cycles: wrong drafts that happen to be right, and a last draft.
SPARE_TOKENS = 32


@dataclass(frozen=True)
class Spread:
    """The mean and the median of a quantity, its smallest and largest sample, and the number of samples."""

    mean: float
    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        return cls(statistics.fmean(samples), statistics.median(samples), min(samples), max(samples), len(samples))

    def scaled(self, factor: float) -> Spread:
        """In another unit: all but the number of samples times a factor."""
        mean, median, low, high = (factor * value for value in (self.mean, self.median, self.low, self.high))
        return Spread(mean, median, low, high, self.samples)


@dataclass(frozen=True)
class Mark:
    """The moment between two steps of a request, and what the model has counted by then."""

    #: By `time.perf_counter`.
    at: float
    #: Seconds in each stage, as `Timings.seconds`, and messages and bytes, as `traffic`.
    stages: Mapping[str, float]
    traffic: Mapping[str, int]


@dataclass
class CycleSample:
    """One cycle of all sessions at once."""

    #: Tokens of each session's step.
    tokens: int
    #: Seconds that it took, on average over the sessions.
    seconds: float
    #: Of a single session, seconds in each stage; and bytes to the worker and back.
    stages: dict[str, float] = field(default_factory=dict)
    up: int = 0
    down: int = 0


class _Plan:
    """Which cycles a number of sessions go through together. The generator's thread uses it.

    First each length has one cycle, to warm up. Then each has a stretch of several cycles, again and again until
    the time is over. The first cycle of a stretch does not count: other sessions may still have the length before.

    Args:
        sessions: how many have to arrive before the first cycle.
        lengths: tokens of each session's steps, in turns.
        cycles: number of cycles of a stretch that count.
        rounds: fewest and most stretches of each length.
        seconds: how long to go on, within these bounds.
    """

    def __init__(
        self, sessions: int, lengths: Sequence[int], cycles: int, rounds: tuple[int, int], seconds: float
    ) -> None:
        self._waiting = sessions
        self._lengths, self._stretch = lengths, cycles + 1
        self._rounds, self._seconds = rounds, seconds
        self._until: float | None = None
        #: Number of cycles; None while it is open.
        self.cycles: int | None = None

    def arrive(self) -> None:
        """A session has had its prompt computed."""
        self._waiting -= 1

    @property
    def is_open(self) -> bool:
        """Whether all sessions have arrived."""
        return self._waiting <= 0

    def length(self, index: int) -> int | None:
        """Tokens of a step in the cycle of this index; None if there is none."""
        count = len(self._lengths)
        if self.cycles is None:
            self._decide(index - count)
        if self.cycles is not None and index >= self.cycles:
            return None
        return self._lengths[index if index < count else (index - count) // self._stretch % count]

    def _decide(self, index: int) -> None:
        now = time.monotonic()
        self._until = self._until or now + self._seconds
        done, into = divmod(index, len(self._lengths) * self._stretch)
        fewest, most = self._rounds
        if into == 0 and done >= fewest and (now >= self._until or done >= most):
            self.cycles = index + len(self._lengths)

    def counts(self, index: int) -> bool:
        """Whether the cycle of this index counts."""
        return index >= len(self._lengths) and (index - len(self._lengths)) % self._stretch > 0


class _Schedule:
    """A drafter of wrong tokens, as many as the plan says, which notes when each step begins. A `Drafter`.

    Args:
        plan: shared by all sessions.
        model: what counts stages and traffic; None to note times alone.
    """

    def __init__(self, plan: _Plan, vocabulary: int, model: Any | None) -> None:
        self._plan, self._model, self._vocabulary = plan, model, vocabulary
        self._arrived = False
        self._draws = itertools.count()
        self.marks: list[Mark] = []
        self.done = threading.Event()

    def extend(self, tokens: Sequence[int]) -> None:
        """Does nothing: what it drafts depends on no text."""

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Does nothing."""

    def draft(self, limit: int) -> list[int]:
        length = self.step()
        if length - 1 > limit:
            self.done.set()
            return []
        # Other tokens each time: a text that repeats itself might become what the model says.
        return [(7 + 7919 * next(self._draws)) % self._vocabulary for _ in range(length - 1)]

    def on_token(self, *_: object) -> None:
        """A step begins, of a model that takes no drafts: another token is chosen. An `OnToken`."""
        self.step()

    def step(self) -> int:
        """A step begins. Returns the number of its tokens."""
        if not self._arrived:
            self._arrived = True
            self._plan.arrive()
        if not self._plan.is_open or self.done.is_set():
            return 1
        length = self._plan.length(len(self.marks))
        self.marks.append(self._mark())
        if length is None:
            self.done.set()
            return 1
        return length

    def _mark(self) -> Mark:
        if self._model is None:
            return Mark(time.perf_counter(), {}, {})
        return Mark(time.perf_counter(), self._model.timings.seconds, self._model.traffic)


class _TreeSchedule(_Schedule):
    """The same of drafts with several continuations. A `TreeDrafter`."""

    def draft_tree(self, budget: int) -> DraftTree:
        """A tree in which two tokens follow each."""
        tokens = self.draft(budget)
        return DraftTree(tokens, [index // 2 - 1 for index in range(len(tokens))], [0.0] * len(tokens))


class Cycles:
    """Measures cycles of a generator that nobody else uses meanwhile.

    Args:
        model, generator: a model, and a generator of it with which nothing else runs.
        prompts: token ids, which sessions take in turns.
    """

    def __init__(self, model: Any, generator: Generator, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._generator, self._prompts = model, generator, prompts
        config = model.config.get_text_config(decoder=True)
        self._vocabulary = int(config.vocab_size)
        self._positions = int(model.split_parts.max_positions)

    def measure(
        self,
        sessions: int,
        lengths: Sequence[int] | None,
        cycles: int,
        rounds: tuple[int, int],
        seconds: float,
        limit: float,
        detailed: bool = False,
        branches: bool = False,
    ) -> list[CycleSample]:
        """Runs stretches of cycles with each length in turns, several times.

        Args:
            sessions: how many at once.
            lengths: tokens of each session's steps; None for one each, without speculation, whose steps may have
                another size.
            cycles: number of cycles in a stretch that count.
            rounds: fewest and most stretches of each length.
            seconds: how long it should take, within these bounds.
            limit: seconds after which it ends.
            detailed: whether to measure stages and traffic, too; of one session.
            branches: whether drafts have several continuations.

        Returns:
            Those that count; none where the model or its worker takes no such drafts.

        Raises:
            MeasurementTimeout: it took longer than the limit.
            SplitError: a request failed.
        """
        drafts, lengths = lengths is not None, lengths or (1,)
        plan = _Plan(sessions, lengths, cycles, rounds, seconds)
        model = self._model if detailed else None
        schedule = _TreeSchedule if branches else _Schedule
        schedules = [schedule(plan, self._vocabulary, model) for _ in range(sessions)]
        most = len(lengths) * (1 + (1 + cycles) * rounds[1])
        running: list[Generation] = []
        try:
            for index, each in enumerate(schedules):
                request = self._request(each if drafts else OFF, index, most)
                running.append(self._generator.submit(request, None if drafts else each.on_token))
            self._wait(running, schedules, limit)
        finally:
            for generation in running:
                generation.cancel()
        for generation in running:
            generation.result()
        return _samples(plan, [each.marks for each in schedules])

    def _request(self, speculate: _Schedule | str, index: int, cycles: int) -> Request:
        tokens = cycles + SPARE_TOKENS
        room = max(1, min(PROMPT, self._positions - tokens))
        prompt = list(self._prompts[index % len(self._prompts)])[-room:]
        config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=[NO_END], pad_token_id=0)
        return Request(prompt, config, speculate=speculate)

    def _wait(self, running: Sequence[Generation], schedules: Sequence[_Schedule], limit: float) -> None:
        until = time.monotonic() + limit
        for generation, schedule in zip(running, schedules, strict=True):
            while not schedule.done.wait(GLANCE):
                if generation.done:
                    generation.result()
                    break
                if time.monotonic() > until:
                    raise MeasurementTimeout(
                        f"{sum(len(each.marks) for each in schedules)} steps of {len(running)} sessions came back "
                        f"in {limit:.0f} s, which are too few: the worker or the network is too slow, or too busy"
                    )


def _samples(plan: _Plan, sessions: Sequence[Sequence[Mark]]) -> list[CycleSample]:
    """The cycles that count, as far as all sessions have come."""
    found = []
    for index in filter(plan.counts, range(min(map(len, sessions)) - 1)):
        tokens = plan.length(index)
        assert tokens is not None
        seconds = statistics.fmean(marks[index + 1].at - marks[index].at for marks in sessions)
        sample = CycleSample(tokens, seconds)
        first, last = sessions[0][index], sessions[0][index + 1]
        if first.stages:
            sample.stages = {stage: last.stages[stage] - since for stage, since in first.stages.items()}
            sample.up, sample.down = (
                last.traffic.get(key, 0) - first.traffic.get(key, 0) for key in ("bytes_sent", "bytes_received")
            )
        found.append(sample)
    return found
