"""A draft model: a small language model on this device that drafts for all requests of a generator.

After "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192): the small model goes on with a
text by itself, and the large one checks that in one step. The small one runs whole, by the same engine as head and
tail, with one forward for all requests that draft.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from split_common.engine.sequences import KVSequence, TokenRun
from split_device.generation.draft_layers import DraftLayers, check_tokens
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
    """What a draft model keeps of one request: its text, and keys and values of most of it.

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

    def holds(self, tokens: Sequence[int]) -> None:
        """A forward of these tokens is through."""
        self._held += tokens

    def repeat_last(self) -> list[int]:
        """Takes the text's last token from the cache, for what follows it. Returns the token."""
        self._sure -= 1
        del self._held[self._sure :]
        self.cache.truncate(self._sure)
        return self.predictor.text[-1:]


class DraftModel:
    """Drafts for many requests. Not thread-safe: the generator's thread uses it.

    Args:
        name: the directory or hub id of its checkpoint.
        model: the split model that it drafts for.
        vocabulary: number of that model's logits.
        kv_bytes: memory for its keys and values.
        tokenizer: the one that is used with that model; None for the one beside it.

    Raises:
        ConfigError: its tokens are not those of the split model.
        UnsupportedFeature: it cannot draft; the message has the reason.
        SplitError: it cannot be loaded; as `load_whole`, and ModelError if the memory holds no page of tokens.
    """

    def __init__(self, name: str, model: Any, vocabulary: int, kv_bytes: int, tokenizer: Any = None) -> None:
        check_tokens(name, str(model.name_or_path), model.revision, tokenizer)
        self._layers = DraftLayers(name, model.dtype, next(model.parameters()).device, kv_bytes)
        self._runner = self._layers.runner
        #: Number of tokens that both models know.
        self._shared = min(self._layers.vocabulary, vocabulary)
        #: Most tokens of a text and a draft behind it.
        self.most_tokens = min(self._runner.max_positions, self._runner.store.capacity)
        self._unreserved = self._runner.store.free
        self._sequences: dict[DraftSequence, None] = {}
        self._read_tokens = LEAST_READ

    def begin(self, tokens: int) -> DraftSequence | None:
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
        sequence = DraftSequence(cache, cost, most_tokens)
        self._sequences[sequence] = None
        return sequence

    def end(self, sequence: DraftSequence) -> None:
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

    def drafts_for(self, sequence: DraftSequence) -> bool:
        """Whether a sequence goes on. It ends by `end`, when a forward fails, or when its text does not fit."""
        return sequence in self._sequences

    def read(self) -> None:
        """Reads some of the texts that are wanted, for about `READ_SECONDS`. What fails ends their sequences."""
        wanted = [each for each in self._sequences if each.wanted]
        with self._failing(wanted):
            self._read(wanted)

    def _read(self, wanted: Sequence[DraftSequence]) -> None:
        left = self._read_tokens
        parts: list[tuple[DraftSequence, list[int]]] = []
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

    def foresee(self, asked: Sequence[tuple[DraftSequence, int]]) -> None:
        """Has the predictors of some sequences expect their texts' likeliest continuations. What fails ends these.

        Args:
            asked: sequences, with the most tokens that are drafted for each.
        """
        with self._failing([sequence for sequence, _ in asked]):
            self._foresee(asked)

    def _foresee(self, asked: Iterable[tuple[DraftSequence, int]]) -> None:
        parts: list[tuple[DraftSequence, list[int]]] = []
        limits: dict[DraftSequence, int] = {}
        for sequence, limit in asked:
            sequence.predictor.forget()
            if sequence not in self._sequences:
                continue
            tokens = sequence.unread()
            limits[sequence] = min(limit, sequence.most_tokens - len(sequence.predictor.text))
            if limits[sequence] <= 0 or tokens != self._fitting(sequence, tokens):
                log.warning("the draft model drafts no more for a request, whose text is too long or strange")
                self.end(sequence)
                continue
            sequence.wanted = len(tokens) > MOST_UNREAD
            if not sequence.wanted:
                parts.append((sequence, tokens or sequence.repeat_last()))
        chances = dict.fromkeys(limits, 1.0)
        while parts and (logits := self._forward(parts)) is not None:
            going: list[tuple[DraftSequence, list[int]]] = []
            for (sequence, _), expected in zip(parts, _likeliest(logits), strict=True):
                chances[sequence] *= sequence.predictor.expect(expected)
                spine = sequence.predictor.spine
                if chances[sequence] < LEAST_CHANCE:
                    sequence.predictor.shorten()
                elif len(spine) < limits[sequence]:
                    going.append((sequence, spine[-1:]))
            parts = going

    def _fitting(self, sequence: DraftSequence, tokens: list[int]) -> list[int]:
        """Those of a text's next tokens that it can read, up to one that it does not know."""
        unknown = (index for index, token in enumerate(tokens) if token >= self._layers.vocabulary)
        length = len(sequence.predictor.text) - len(tokens)
        return tokens[: min(next(unknown, len(tokens)), max(0, sequence.most_tokens - length))]

    def _forward(
        self, parts: Sequence[tuple[DraftSequence, list[int]]], logits: bool = True
    ) -> torch.Tensor | None:
        """Runs tokens of some sequences. If that fails, these end.

        Returns:
            With `logits`, those that follow the last token of each part, `[parts, shared vocabulary]`; an empty
            tensor without; None if it failed.
        """
        with self._failing([sequence for sequence, _ in parts]):
            tokens = [token for _, part in parts for token in part]
            positions = [position for sequence, part in parts for position in sequence.positions(part)]
            states = self._layers.ends.embed(tokens, positions, [None] * len(tokens))
            embedded = torch.split(states, [len(part) for _, part in parts])
            outputs = self._runner.run(
                [
                    TokenRun(sequence.cache, own, sequence.positions(part))
                    for (sequence, part), own in zip(parts, embedded, strict=True)
                ]
            )
            for sequence, part in parts:
                sequence.holds(part)
            if not logits:
                return torch.empty(0)
            last = torch.stack([output[-1] for output in outputs])
            return self._layers.ends.logits(last, [None] * len(parts))[:, : self._shared]
        return None

    @contextlib.contextmanager
    def _failing(self, sequences: Sequence[DraftSequence]) -> Iterator[None]:
        """Ends these sequences if what is done with them fails: the requests need no drafts."""
        try:
            yield
        except Exception as error:
            log.warning("the draft model failed, and drafts no more for %d requests: %s", len(sequences), error)
            log.debug("the draft model failed", exc_info=error)
            for sequence in sequences:
                sequence.predictor.forget()
                self.end(sequence)


def _likeliest(logits: torch.Tensor) -> list[dict[int, float]]:
    """The likeliest tokens of each row of logits `[rows, vocabulary]`, with their chances."""
    top = logits.topk(min(ALTERNATIVES, logits.shape[-1]), dim=-1)
    chances = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
    rows = zip(top.indices.tolist(), chances.tolist(), strict=True)
    return [dict(zip(tokens, row, strict=True)) for tokens, row in rows]
