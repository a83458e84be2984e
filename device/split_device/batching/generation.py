"""A request to generate, and what becomes of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from transformers import GenerationConfig

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Logprobs:
    """Of one generated token, by the model's own distribution: before temperature, penalties and the like."""

    chosen: float
    #: The most likely tokens, the likeliest first.
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Request:
    """What to generate.

    Args:
        prompt: token ids, at least one; all are attended to, pad tokens too.
        config: as for `generate`, greedy or sampling; what it leaves open the model's own fills in.
        seed: of sampling; the tokens are those of `generate` after `torch.manual_seed(seed)`. None for any.
        generated: tokens that were generated before, if this continues a request.
        sampler: what `on_token` was told with the last of `generated`; None for greedy ones.
        priority: a request of a higher one goes first.
        logprobs: how many of the likeliest tokens to tell of with each token; None for no logprobs at all.
    """

    prompt: list[int]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    seed: int | None = None
    generated: list[int] = field(default_factory=list)
    sampler: bytes | None = None
    priority: int = 0
    logprobs: int | None = None


#: Is told, on the generator's thread, of each token: the token, its logprobs if they were asked for, and the state
#: of the random generator after it (None if greedy).
OnToken = Callable[[int, Logprobs | None, bytes | None], None]


class Generation:
    """A request under way. All methods may be called in any thread.

    Iterating gives the new tokens as they come, and ends with the generation.
    """

    def __init__(self, request: Request, on_token: OnToken | None, on_cancel: Callable[[Generation], None]) -> None:
        self.request = request
        #: All tokens so far, those of `request.generated` first.
        self.tokens: list[int] = list(request.generated)
        #: Why it ended; None before, and after an error.
        self.finish_reason: FinishReason | None = None
        #: What ended it, if it failed.
        self.error: BaseException | None = None
        #: Has the tokens, or the error, in the end. `asyncio.wrap_future` makes it awaitable.
        self.future: Future[list[int]] = Future()
        self._on_token = on_token
        self._on_cancel = on_cancel
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        return self.future.done()

    def result(self, timeout: float | None = None) -> list[int]:
        """All tokens, also of a generation that was cancelled. Raises what it failed with, or TimeoutError."""
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Ends it soon with the tokens that it has by then."""
        self._on_cancel(self)

    def __iter__(self) -> Iterator[int]:
        """Raises what the generation failed with."""
        seen = len(self.request.generated)
        while new := self._after(seen):
            yield from new
            seen += len(new)
        self.result()

    def _after(self, seen: int) -> list[int]:
        """Waits for tokens after the first ones; none when there will not be any."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.tokens) > seen or self.done)
            return self.tokens[seen:]

    # --- the generator's thread ----------------------------------------------------------------------------

    def add(self, token: int, logprobs: Logprobs | None, sampler: bytes | None) -> None:
        with self._changed:
            self.tokens.append(token)
            self._changed.notify_all()
        if self._on_token is not None:
            self._on_token(token, logprobs, sampler)

    def finish(self, outcome: FinishReason | BaseException) -> None:
        """Only the first call counts."""
        if self.done:
            return
        with self._changed:
            if isinstance(outcome, BaseException):
                self.error = outcome
                self.future.set_exception(outcome)
            else:
                self.finish_reason = outcome
                self.future.set_result(self.tokens)
            self._changed.notify_all()
