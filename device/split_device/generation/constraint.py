"""What the next token of an answer may be, by a grammar; and the grammars of one model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from split_common.errors import Busy, ConfigError, UnsupportedFeature
from split_device.generation.grammar import KEPT, grammar_of
from split_device.generation.grammar_tokenizer import grammar_tokenizer
from split_device.generation.structured import Source, StructuredOutputs

#: Threads that compile grammars. They wait for processes most of the time.
COMPILING = 8

#: Bounds of the work for one token: about 10 ms.
_LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, verbose_errors=False)


class GrammarConstraint:
    """The state of one answer's grammar. Not thread-safe.

    Where the grammar leaves only one text, that is written as the tokenizer writes it: each of its tokens is the
    only one that may come. At the end of the grammar, that is the token that ends a text.

    Args:
        matcher: at the state before the first token.
        vocabulary: the number of the model's logits.
        ends: ids of the tokens that end a text; the first is the one that a complete grammar ends with.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int, ends: list[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ends = ends
        self._bits = torch.zeros((vocabulary + 31) // 32, dtype=torch.int32)
        #: The next tokens, if the grammar leaves only one text; empty if that is not known yet.
        self._forced: list[int] = []
        self._looked = False
        #: Whether the text is complete, its end token included.
        self.finished = False

    def forced(self) -> int | None:
        """The only token that may come next; None if there are several."""
        if not self._looked:
            self._looked, self._forced = True, self._look()
        return self._forced[0] if self._forced else None

    def mask(self) -> torch.Tensor:
        """Which tokens may come next, bool `[vocabulary]`, at least one.

        Raises:
            UnsupportedFeature: the grammar is too complex to go on.
        """
        if (token := self.forced()) is not None:
            mask = torch.zeros(self._vocabulary, dtype=torch.bool)
            mask[token] = True
            return mask
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.numel() * 4)
        self._check()
        bits = np.unpackbits(self._bits.numpy().view(np.uint8), count=self._vocabulary, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)

    def accept(self, token: int) -> None:
        """Goes on after this token.

        Raises:
            ConfigError: it may not come next.
            UnsupportedFeature: the grammar is too complex to go on.
        """
        if token in self._ends:
            fits = self._matcher.is_accepting() and not self.finished
            self.finished = True
        else:
            fits = not self.finished and self._matcher.consume_token(token)
        if not fits:
            if "satisfy the grammar" not in self._matcher.get_error():
                # It was the grammar that could not go on.
                self._check()
            raise ConfigError(f"structured outputs: token {token} does not fit the grammar")
        self._check()
        # A text of many tokens is looked for once: to look for the rest of it after each would take quadratic time.
        self._forced = self._forced[1:] if self._forced[:1] == [token] else []
        self._looked = bool(self._forced)

    def _look(self) -> list[int]:
        self._check()
        if self._matcher.is_stopped():
            return [self._ends[0]]
        found = self._matcher.compute_ff_tokens()
        return found[: self._matcher.validate_tokens(found)] if found else []

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnsupportedFeature(f"structured outputs: {' '.join(self._matcher.get_error().split())}")


class Grammars:
    """The grammars of one model. Threads of its own compile them; any thread may use it.

    Args:
        tokenizer: the model's tokenizer, of transformers.
        vocabulary: the number of the model's logits.
        ends: ids of the tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        own = tokenizer.eos_token_id
        #: Ids of the tokens that end a text; the first is the one that a complete grammar ends with.
        self.ends = sorted(ends, key=lambda id_: (id_ != own, id_))
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._compiling = ThreadPoolExecutor(COMPILING, "grammars")
        self._kept: OrderedDict[Source, Future[LLMatcher]] = OrderedDict()

    def prepare(self) -> Future[LLTokenizer]:
        """Begins to make what all grammars need, which takes a second or more of a large vocabulary.

        The future raises UnsupportedFeature if the model has no end token.
        """
        return self._compiling.submit(self._tokenizer_for_grammars)

    def compile(self, structured: StructuredOutputs) -> Future[LLMatcher]:
        """Begins to compile a grammar, unless it is kept from before.

        The future raises what `grammar_of` raises, and UnsupportedFeature if the model has no end token.
        """
        key = structured.source()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            self._kept[key] = future = self._compiling.submit(self._compiled, structured)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        future.add_done_callback(lambda done: self._forget_if_busy(key, done))
        return future

    def _forget_if_busy(self, key: Source, done: Future[LLMatcher]) -> None:
        """Another request may find the machine less busy."""
        if isinstance(done.exception(), Busy):
            with self._lock:
                if self._kept.get(key) is done:
                    del self._kept[key]

    def constraint(self, structured: StructuredOutputs) -> GrammarConstraint:
        """A constraint for one answer. Waits for its grammar. Raises what the future of `compile` raises."""
        matcher = self.compile(structured).result()
        return GrammarConstraint(matcher.deep_copy(), self._vocabulary, self.ends)

    def _compiled(self, structured: StructuredOutputs) -> LLMatcher:
        grammar = grammar_of(structured)
        prepared = self._tokenizer_for_grammars()
        matcher = LLMatcher(prepared, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise ConfigError(f"structured outputs: {' '.join(matcher.get_error().split())}")
        return matcher

    def _tokenizer_for_grammars(self) -> LLTokenizer:
        with self._preparing:
            return self._prepared

    @cached_property
    def _prepared(self) -> LLTokenizer:
        return grammar_tokenizer(self._tokenizer, self._vocabulary, self.ends)
