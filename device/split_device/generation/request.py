"""A request to generate, and the generation that answers it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from transformers import GenerationConfig

from split_device.models.adapters import LoadedAdapter
from split_device.sessions.identity import check_request_id, new_request_id
from split_device.sessions.notices import OnNotice
from split_device.speculation.drafter import Drafter
from split_device.speculation.names import OFF

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of one token under the model's own distribution, before any logits processor."""

    chosen: float
    #: The most likely tokens and their log probabilities, in descending order.
    top: list[tuple[int, float]]
    #: How many tokens are as likely as this one or likelier, itself included.
    rank: int = 1


class Constraint(Protocol):
    """What the next token of a generation may be. The generator's thread calls it."""

    def mask(self) -> torch.Tensor | None:
        """Which tokens may come next, bool `[vocabulary]` on the CPU, at least one; None if all may."""

    def forced(self) -> int | None:
        """The only token that may come next; None if there are several."""

    def accept(self, token: int) -> None:
        """Goes on after this token. Called for each token, from the first of `Request.generated`."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete, its end token included."""


@dataclass(frozen=True)
class Request:
    """What to generate.

    Args:
        prompt: token ids, at least one. All are attended to, pad tokens included.
        config: as for `generate`, greedy or sampling. Defaults come from the model's generation configuration.
        seed: seed of sampling: the tokens equal those of `generate` after `torch.manual_seed(seed)`. None: random.
        generated: the tokens generated so far, to continue an earlier request.
        sampler: the state of the random generator that came with the last of `generated`; None if greedy.
        priority: requests with a higher priority go first.
        logprobs: the number of alternatives to report with each token; None for no log probabilities.
        prompt_logprobs: the same for the tokens of the prompt, in `Generation.prompt_logprobs`. All of the prompt
            then goes through the model.
        frequency_penalty, presence_penalty: subtracted from the logit of each token that was generated before: the
            first as many times as it was, the second once. Tokens of the prompt do not count.
        constraint: limits which tokens are chosen. It belongs to this request alone.
        request_id: the id by which logs name it, 1 to 128 visible ASCII characters; None for a random one.
        index: which of the choices of one request id it is, from 0.
        adapter: the name of one of the model's adapters; None for the active one, "" for none.
        images: what a processor made of the prompt's images: further arguments of `generate`, such as
            `pixel_values`, for one row. The prompt has the tokens that stand for the images.
        speculate: what drafts its tokens: `auto`, `off`, the name of a drafter, or a drafter of this request's own,
            which then drafts as much as it likes; None for the generator's default. It changes no token.
    """

    prompt: list[int]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    seed: int | None = None
    generated: list[int] = field(default_factory=list)
    sampler: bytes | None = None
    priority: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    constraint: Constraint | None = None
    request_id: str | None = None
    index: int = 0
    adapter: str | None = None
    images: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    speculate: str | Drafter | None = None


#: Called on the generator's thread for each token: the token, its log probabilities if requested, and the state of
#: the random generator after it (None if greedy).
OnToken = Callable[[int, Logprobs | None, bytes | None], None]


class Generation:
    """A generation in progress. Its methods may be called from any thread.

    Iterating yields new tokens as they arrive, until the generation ends.

    Raises:
        ConfigError: the request's id is not one.
    """

    def __init__(
        self,
        request: Request,
        on_token: OnToken | None,
        on_cancel: Callable[[Generation], None],
        on_notice: OnNotice | None = None,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        self.request = request
        #: The request's adapter, or the model's active one.
        self.adapter = adapter
        #: The adapter's name; None for none.
        self.adapter_name = adapter.name if adapter is not None else None
        #: The id by which logs name it.
        self.request_id = new_request_id() if request.request_id is None else check_request_id(request.request_id)
        #: Its place in the order in which requests came; None before it is known.
        self.place: int | None = None
        #: By which broker and worker name its session: the first 8 hexadecimal digits of the session's key. None
        #: before it begins; another one if it has to begin again.
        self.session: str | None = None
        #: Tokens of the prompt that were not computed again: head, tail and worker had them from earlier requests.
        #: Known when the first token is.
        self.cached_tokens = 0
        #: The drafter of its tokens or its name, `auto` or `off`.
        self.speculate: str | Drafter = OFF
        #: Tokens that were drafted for it, and how many of them are in its text.
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.on_notice = on_notice
        #: All tokens so far, starting with `request.generated`.
        self.tokens: list[int] = list(request.generated)
        #: Log probabilities of the prompt's tokens, if requested; None for the first one, which nothing precedes.
        #: Complete before the first token is chosen.
        self.prompt_logprobs: list[Logprobs | None] = []
        #: Why the generation ended; None while it runs, and after an error.
        self.finish_reason: FinishReason | None = None
        #: The error that ended the generation, if it failed.
        self.error: BaseException | None = None
        #: Resolves to the tokens, or to the error. `asyncio.wrap_future` makes it awaitable.
        self.future: Future[list[int]] = Future()
        self._on_token = on_token
        self._on_cancel = on_cancel
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        return self.future.done()

    def result(self, timeout: float | None = None) -> list[int]:
        """Waits for all tokens, also of a cancelled generation. Raises the generation's error, or TimeoutError."""
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Ends the generation soon, with the tokens that it has by then."""
        self._on_cancel(self)

    def __iter__(self) -> Iterator[int]:
        """Yields the new tokens. Raises the generation's error."""
        seen = len(self.request.generated)
        while new := self._after(seen):
            yield from new
            seen += len(new)
        self.result()

    def _after(self, seen: int) -> list[int]:
        """Waits for tokens beyond the first `seen`; empty when there will be no more."""
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
        """Ends the generation. Only the first call has an effect."""
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
