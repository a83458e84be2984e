"""Predicts tokens per second: speculation on texts that are known, by a clock of measured cycles."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from split_device.speculation.drafter import Drafter
from split_device.speculation.drafters import make_drafter
from split_device.speculation.names import AUTO, OFF
from split_device.speculation.speculation import Cycle, Pace, Speculation

#: The least share of a cycle's time that is left, whatever a codec saves, or noise takes off what was measured.
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class CycleTimes:
    """How long a cycle takes, from one choice of tokens to the next one. Between measured ones it is a mean.

    Args:
        seconds: for each number of sessions, and of tokens in each session's step, both in ascending order.
        message, token: seconds that a codec adds for each message, and for each token. They may be negative.
        learning: seconds that a drafter takes to learn from a token.
        room: the tokens for which those steps had room.
        plain: the times of steps with room for one token; None if they are not known.
    """

    seconds: Mapping[int, Mapping[int, float]]
    message: float = 0.0
    token: float = 0.0
    learning: float = 0.0
    room: int = 1
    plain: CycleTimes | None = None

    def of(self, sessions: int, tokens: float, room: int | None = None) -> float:
        """Seconds of a cycle.

        Args:
            sessions: how many have steps.
            tokens: how many all these have.
            room: the tokens for which each of them has room; None for those of the steps that were measured.
        """
        seconds = self._measured(sessions, tokens)
        if room is None or self.plain is None or room >= self.room:
            return seconds
        # What room costs is bytes, so each token of it costs the same.
        plain = self.plain.of(sessions, sessions)
        padding = max(0.0, self._measured(sessions, sessions) - plain)
        # Steps of more tokens may have been measured as faster ones.
        return max(min(seconds, plain), seconds - padding * (self.room - room) / (self.room - 1))

    def _measured(self, sessions: int, tokens: float) -> float:
        each = tokens / sessions
        exact = _between({count: _between(row, each) for count, row in self.seconds.items()}, sessions)
        # A line through the last two points may fall below zero.
        exact = max(exact, LEAST_SHARE * min(min(row.values()) for row in self.seconds.values()))
        return max(LEAST_SHARE * exact, exact + sessions * self.message + tokens * (self.token + self.learning))


def _between(points: Mapping[int, float], at: float) -> float:
    """The value at a place: on the line through the points on both sides of it, or through the last two."""
    places = list(points)
    if len(places) == 1:
        return points[places[0]]
    right = min(max(bisect_right(places, at), 1), len(places) - 1)
    low, high = places[right - 1], places[right]
    return points[low] + (points[high] - points[low]) * (at - low) / (high - low)


@dataclass(frozen=True)
class SampleText:
    """A prompt and the model's own answer.

    Args:
        prompt, answer: token ids.
        expected: for each token of the answer, the likeliest ones in its place and their log probabilities.
        vocabulary: number of tokens that there are.
    """

    prompt: list[int]
    answer: list[int]
    expected: list[list[tuple[int, float]]] = field(repr=False)
    vocabulary: int

    def logits(self, first: int, count: int) -> torch.Tensor:
        """What the model expected in some places of the answer: float32 `[count, vocabulary]`.

        Tokens that are not among the likeliest share what these leave.
        """
        rows = []
        for likeliest in self.expected[first : first + count]:
            ids, chances = zip(*likeliest, strict=True)
            known = torch.tensor(chances).exp()
            left = max(1e-9, 1.0 - float(known.sum())) / max(1, self.vocabulary - len(ids))
            row = torch.full((self.vocabulary,), left)
            row[list(ids)] = known
            rows.append(row.log())
        return torch.stack(rows)


@dataclass(frozen=True)
class Forecast:
    """What a setting will give."""

    #: Of all sessions together, after their first tokens.
    tokens_per_second: float
    #: Tokens that a session's step brings, on average.
    tokens_per_step: float


def forecast(
    texts: Sequence[SampleText], speculate: str, sessions: int, times: CycleTimes, longest: int, pads: bool = False
) -> Forecast:
    """Predicts how fast the device generates these texts.

    The texts come in groups of as many as there are sessions, and again from the first one where they are too few.
    A single session generates each to its end. Several begin together, and what counts is the time until the first
    one ends.

    Args:
        texts: with at least two tokens of answer each.
        speculate: `auto`, `off` or the name of a drafter.
        sessions: how many generate at once.
        longest: most tokens of a draft.
        pads: whether steps are padded.
    """
    clock = _Clock(times)
    pace = Pace(longest, lambda: clock.now, pads)
    tokens = steps = 0
    for group in groups(texts, sessions):
        running = [_Session(text, pace, speculate, longest) for text in group]
        for place, session in enumerate(running):
            session.next_step(sessions, sum(len(each.draft) for each in running[:place]))
        while all(session.left for session in running):
            clock.cycle(running)
            for session in running:
                tokens += session.check()
                steps += 1
                others = sum(len(each.draft) for each in running if each is not session)
                session.next_step(sessions, others)
    return Forecast(tokens / clock.now, tokens / steps)


def groups(texts: Sequence[SampleText], sessions: int) -> Iterator[list[SampleText]]:
    """The texts that sessions generate together, in order."""
    endless = itertools.cycle(texts)
    for _ in range(max(1, len(texts) // sessions)):
        yield list(itertools.islice(endless, sessions))


def _speculation(pace: Pace, speculate: str) -> Speculation | None:
    if speculate == OFF:
        return None
    return Speculation(pace, _Known(make_drafter(speculate, pace.successors)), speculate == AUTO)


class _Known:
    """A drafter that is told nothing of tokens after which it is not known what the model expects."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.extend, self.draft = drafter.extend, drafter.draft

    def learn(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        self._drafter.learn(tokens[: len(logits)], logits)


class _Clock:
    def __init__(self, times: CycleTimes) -> None:
        self.now = 0.0
        self._times = times

    def cycle(self, running: Sequence[_Session]) -> None:
        """The steps of all sessions are under way, and come back."""
        tokens = sum(1 + len(session.draft) for session in running)
        rooms = [session.room for session in running if session.room is not None]
        padding = sum(session.room - 1 - len(session.draft) for session in running if session.room is not None)
        drafted = any(session.draft for session in running)
        cycle = Cycle(self.now, len(running), tokens, drafted, max(0, padding))
        for session in running:
            if session.speculation is not None:
                session.speculation.cycle = cycle
        self.now += self._times.of(len(running), tokens, round(sum(rooms) / len(rooms)) if rooms else None)


class _Session:
    """One answer, of which the first token is there. It does what `generation/drafting.py` does of a request."""

    def __init__(self, text: SampleText, pace: Pace, speculate: str, longest: int) -> None:
        self._text, self._longest = text, longest
        # That whose steps have as much room as pays.
        self._sizes = pace.room if speculate == AUTO else None
        self.speculation = _speculation(pace, speculate)
        self.draft: list[int] = []
        #: The tokens for which its step has room; None if that is always the same.
        self.room: int | None = None
        self._known = 1
        if self.speculation is not None:
            self.speculation.extend([*text.prompt, text.answer[0]])
            self.speculation.checked(1, text.prompt[-1:], text.logits(0, 1), 0)

    @property
    def left(self) -> int:
        """Number of tokens that are not chosen yet."""
        return len(self._text.answer) - self._known

    def next_step(self, rows: int, others: int) -> None:
        """Drafts behind the last token, one token less than may be chosen."""
        self.draft = []
        longest = self._longest
        if self._sizes is not None:
            self.room = self._sizes.tokens
            longest = self.room - 1
        if self.speculation is not None and self.left:
            self.draft = self.speculation.draft(1, min(self.left - 1, longest), rows, others)

    def check(self) -> int:
        """The step is back. Returns the number of tokens that it has brought."""
        begin, answer = self._known, self._text.answer
        right = 0
        while right < len(self.draft) and self.draft[right] == answer[begin + right]:
            right += 1
        self._known += right + 1
        if self.speculation is not None:
            self.speculation.extend(answer[begin : self._known])
            logits = self._text.logits(begin, right + 1)
            self.speculation.checked(1, [answer[begin - 1], *self.draft], logits, right)
        return right + 1
