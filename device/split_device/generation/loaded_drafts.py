"""Layers on this device that draft for all requests of a generator: what draft models and MTP layers share.

Both run by the same engine as head and tail, with one forward for all requests that draft. Each forward gives each
draft one token more.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from split_common.engine.runner import Runner
from split_common.engine.sequences import KVSequence, TokenRun
from split_device.speculation.spine import SpinePredictor
from split_device.speculation.tree import LEAST_CHANCE

log = logging.getLogger(__name__)

#: Number of likeliest next tokens that are kept of each place of a draft.
ALTERNATIVES = 4

#: Most tokens of a text that are read in the forward that begins its draft. More are read before, while steps are
#: away.
MOST_UNREAD = 48

#: How long reading may keep the generator's thread from a reply, in seconds; and how many tokens are read at once.
READ_SECONDS = 0.03
LEAST_READ, MOST_READ = 16, 512


class DraftSequence:
    """What is kept of one request that loaded layers draft for: its text, and keys and values of most of it.

    Args:
        cache: holds the keys and values.
        cost: memory that is reserved for it, in units of the store.
        most_tokens: of the text, and of the draft behind it.
    """

    def __init__(self, cache: KVSequence, cost: int, most_tokens: int) -> None:
        self.predictor = SpinePredictor()
        self.cache, self.cost, self.most_tokens = cache, cost, most_tokens
        #: Whether the model is to read its text before a draft is asked for.
        self.wanted = False
        #: The tokens that the cache holds, of which those before `_sure` are the text's.
        self._held: list[int] = []
        self._sure = 0

    def unread(self) -> list[int]:
        """The tokens of the text that the cache lacks, after those that are not the text's are cut off it."""
        text, held = self.predictor.text, self._held
        while self._sure < min(len(text), len(held)) and text[self._sure] == held[self._sure]:
            self._sure += 1
        if len(held) > self._sure:
            del held[self._sure :]
            self.cache.truncate(self._sure)
        return text[self._sure :]

    def positions(self, tokens: Sequence[int]) -> range:
        """The positions of the tokens that come next."""
        return range(len(self._held), len(self._held) + len(tokens))

    def holds(self, tokens: Sequence[int], outputs: torch.Tensor) -> None:
        """A forward of these tokens is through, whose outputs are `[tokens, width]`."""
        self._held += tokens

    @property
    def held(self) -> int:
        """Number of tokens in the cache."""
        return len(self._held)

    def computed(self, states: torch.Tensor) -> None:
        """Takes the model's states `[tokens, width]` of the text's next tokens, and of a draft behind them."""

    def chosen(self, wrong: int, entering: int) -> None:
        """A step is through, and the text has its next tokens.

        Args:
            wrong: number of the states, the last ones, that are of drafts that were not right.
            entering: number of the text's tokens, the last ones, that have no state yet.
        """

    def can_begin(self, tokens: int) -> bool:
        """Whether a draft can begin behind a text of which so many tokens have not been through the model."""
        return True

    def repeat_last(self) -> list[int]:
        """Takes the text's last token from the cache, for what follows it. Returns the token."""
        self._sure -= 1
        del self._held[self._sure :]
        self.cache.truncate(self._sure)
        return self.predictor.text[-1:]


Sequence_ = TypeVar("Sequence_", bound=DraftSequence)


class LoadedDrafts(Generic[Sequence_]):
    """Drafts for many requests. Not thread-safe: the generator's thread uses it.

    Args:
        name: what drafts, for messages.
        runner: runs the layers.
        known: number of tokens that the layers know.
        shared: number of those that the split model knows, too.
    """

    def __init__(self, name: str, runner: Runner, known: int, shared: int) -> None:
        self._name, self._runner, self._known, self._shared = name, runner, known, shared
        #: Most tokens of a text and a draft behind it.
        self.most_tokens = min(runner.max_positions, runner.store.capacity)
        self._unreserved = runner.store.free
        self._sequences: dict[Sequence_, None] = {}
        self._read_tokens = LEAST_READ

    def _sequence(self, cache: KVSequence, cost: int, most_tokens: int) -> Sequence_:
        """A sequence for a request, with the arguments of `DraftSequence`."""
        raise NotImplementedError

    def _inputs(self, parts: Sequence[tuple[Sequence_, list[int]]]) -> torch.Tensor:
        """The first layer's inputs `[tokens, width]` for some sequences' next tokens."""
        raise NotImplementedError

    def _logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits `[rows, known]` of the last layer's outputs `[rows, width]`."""
        raise NotImplementedError

    def begin(self, tokens: int) -> Sequence_ | None:
        """Makes a sequence, and reserves memory for a text of this many tokens. `end` frees it.

        Returns:
            The sequence; None if there is no memory for it.
        """
        most_tokens = min(tokens, self.most_tokens)
        cache = self._runner.store.new_sequence()
        cost = cache.cost(most_tokens)
        if cost > self._unreserved:
            cache.free()
            return None
        self._unreserved -= cost
        sequence = self._sequence(cache, cost, most_tokens)
        self._sequences[sequence] = None
        return sequence

    def end(self, sequence: Sequence_) -> None:
        """Frees a sequence's memory. Does nothing the second time."""
        if sequence in self._sequences:
            del self._sequences[sequence]
            sequence.cache.free()
            self._unreserved += sequence.cost

    @property
    def held_tokens(self) -> int:
        """Tokens of memory that are not free."""
        return self._runner.store.capacity - self._runner.store.free_tokens

    @property
    def reads(self) -> bool:
        """Whether `read` has something to do."""
        return any(each.wanted for each in self._sequences)

    def drafts_for(self, sequence: Sequence_) -> bool:
        """Whether a sequence goes on. It ends by `end`, when a forward fails, or when its text does not fit."""
        return sequence in self._sequences

    def computed(self, sequence: Sequence_, states: torch.Tensor) -> None:
        """As `DraftSequence.computed`. What fails ends the sequence."""
        if sequence in self._sequences:
            with self._failing([sequence]):
                sequence.computed(states)

    def chosen(self, sequence: Sequence_, wrong: int, entering: int) -> None:
        """As `DraftSequence.chosen`. What fails ends the sequence."""
        if sequence in self._sequences:
            with self._failing([sequence]):
                sequence.chosen(wrong, entering)

    def read(self) -> None:
        """Reads some of the texts that are wanted, for about `READ_SECONDS`. What fails ends their sequences."""
        wanted = [each for each in self._sequences if each.wanted]
        with self._failing(wanted):
            self._read(wanted)

    def _read(self, wanted: Sequence[Sequence_]) -> None:
        left = self._read_tokens
        parts: list[tuple[Sequence_, list[int]]] = []
        for sequence in wanted:
            tokens = sequence.unread()
            if part := self._fitting(sequence, tokens)[:left]:
                parts.append((sequence, part))
            sequence.wanted = len(part) == left < len(tokens)
            left -= len(part)
            if not left:
                break
        began = time.perf_counter()
        if parts and self._forward(parts, logits=False) is not None and not left:
            seconds = time.perf_counter() - began
            wished = int(self._read_tokens * READ_SECONDS / seconds)
            self._read_tokens = max(LEAST_READ, min(MOST_READ, 2 * self._read_tokens, wished))

    def foresee(self, asked: Sequence[tuple[Sequence_, int]]) -> None:
        """Has the predictors of some sequences expect their texts' likeliest continuations. What fails ends these.

        Args:
            asked: sequences, with the most tokens that are drafted for each.
        """
        with self._failing([sequence for sequence, _ in asked]):
            self._foresee(asked)

    def _foresee(self, asked: Iterable[tuple[Sequence_, int]]) -> None:
        parts: list[tuple[Sequence_, list[int]]] = []
        limits: dict[Sequence_, int] = {}
        for sequence, limit in asked:
            sequence.predictor.forget()
            if sequence not in self._sequences:
                continue
            tokens = sequence.unread()
            limits[sequence] = min(limit, sequence.most_tokens - len(sequence.predictor.text))
            if limits[sequence] <= 0 or tokens != self._fitting(sequence, tokens):
                log.warning("%s drafts no more for a request, whose text is too long or strange", self._name)
                self.end(sequence)
                continue
            sequence.wanted = len(tokens) > MOST_UNREAD
            if not sequence.wanted and (tokens := tokens or sequence.repeat_last()):
                parts.append((sequence, tokens))
        chances = dict.fromkeys(limits, 1.0)
        while parts and (logits := self._forward(parts)) is not None:
            going: list[tuple[Sequence_, list[int]]] = []
            for (sequence, _), expected in zip(parts, _likeliest(logits), strict=True):
                chances[sequence] *= sequence.predictor.expect(expected)
                spine = sequence.predictor.spine
                if chances[sequence] < LEAST_CHANCE:
                    sequence.predictor.shorten()
                elif len(spine) < limits[sequence]:
                    going.append((sequence, spine[-1:]))
            parts = going

    def _fitting(self, sequence: Sequence_, tokens: list[int]) -> list[int]:
        """Those of a text's next tokens that it can read, up to one that it does not know."""
        unknown = (index for index, token in enumerate(tokens) if token >= self._known)
        return tokens[: min(next(unknown, len(tokens)), max(0, sequence.most_tokens - sequence.held))]

    def _forward(self, parts: Sequence[tuple[Sequence_, list[int]]], logits: bool = True) -> torch.Tensor | None:
        """Runs tokens of some sequences. If that fails, these end.

        Returns:
            With `logits`, those that follow the last token of each part, `[parts, shared vocabulary]`; an empty
            tensor without; None if it failed.
        """
        with self._failing([sequence for sequence, _ in parts]):
            inputs = torch.split(self._inputs(parts), [len(part) for _, part in parts])
            outputs = self._runner.run(
                [
                    TokenRun(sequence.cache, own, sequence.positions(part))
                    for (sequence, part), own in zip(parts, inputs, strict=True)
                ]
            )
            for (sequence, part), output in zip(parts, outputs, strict=True):
                sequence.holds(part, output)
            if not logits:
                return torch.empty(0)
            return self._logits(torch.stack([output[-1] for output in outputs]))[:, : self._shared]
        return None

    @contextlib.contextmanager
    def _failing(self, sequences: Sequence[Sequence_]) -> Iterator[None]:
        """Ends these sequences if what is done with them fails: the requests need no drafts."""
        try:
            yield
        except Exception as error:
            log.warning("%s failed, and drafts no more for %d requests: %s", self._name, len(sequences), error)
            log.debug("%s failed", self._name, exc_info=error)
            for sequence in sequences:
                sequence.predictor.forget()
                self.end(sequence)


def _likeliest(logits: torch.Tensor) -> list[dict[int, float]]:
    """The likeliest tokens of each row of logits `[rows, vocabulary]`, with their chances."""
    top = logits.topk(min(ALTERNATIVES, logits.shape[-1]), dim=-1)
    chances = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
    rows = zip(top.indices.tolist(), chances.tolist(), strict=True)
    return [dict(zip(tokens, row, strict=True)) for tokens, row in rows]
