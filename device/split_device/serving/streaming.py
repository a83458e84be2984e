"""Streams of generated text: one for each choice of a response."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from split_device.generation.answers import AnswerStream
from split_device.generation.generator import Generation, Logprobs
from split_device.generation.token_logprobs import LogprobsWriter, TokenLogprobs, prompt_logprobs
from split_device.generation.tool_calls import AnswerPiece
from split_device.jobs.job import JobProgress, Task
from split_device.jobs.models import Loaded
from split_device.serving.choices import Choice

#: Priority of interactive requests, for which the generator reserves capacity.
PRIORITY = 1

_NO_PROGRESS = JobProgress([], "", None)


@dataclass(frozen=True)
class Notice:
    """What is said of a generation that waits: that its worker is gone, say, or that another one has taken over."""

    text: str


class ChoiceStream:
    """One choice of a response. Create and use it within an event loop; `start` comes first, on any thread.

    Args:
        prompt: the token ids of the task's prompt.
        request_id, index: the id of the request, and which of its choices this is.
        adapter: the name of an adapter; "" for none.
    """

    def __init__(
        self,
        loaded: Loaded,
        task: Task,
        prompt: list[int],
        request_id: str | None = None,
        index: int = 0,
        adapter: str = "",
    ) -> None:
        self._loaded, self._task, self._prompt = loaded, task, prompt
        self._request_id, self._index, self._adapter = request_id, index, adapter
        self._logprobs = LogprobsWriter(loaded.tokenizer)
        self._wants_logprobs = isinstance(task.logprobs, int)
        self._events: asyncio.Queue[tuple[int, Logprobs | None] | Notice | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.prompt_tokens = len(prompt)
        self._answer: AnswerStream
        self._generation: Generation
        # Held while the generation begins or is cancelled.
        self._lock, self._begun, self._cancelled = threading.Lock(), False, False

    def start(self) -> None:
        """Begins the generation, unless it was cancelled. Many entries of a request's fields take a while.

        Raises:
            ConfigError: a setting is refused.
        """
        loaded, task, prompt = self._loaded, self._task, self._prompt
        name = None if self._request_id is None else f"{self._request_id}/{self._index}"
        self._answer = loaded.answer(task, prompt, name)
        request = dataclasses.replace(
            loaded.request(task, _NO_PROGRESS, PRIORITY, prompt),
            request_id=self._request_id,
            index=self._index,
            adapter=self._adapter,
        )

        def put(event: tuple[int, Logprobs | None] | Notice | None) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

        with self._lock:
            if self._cancelled:
                return
            self._generation = loaded.generator.submit(
                request, lambda token, found, _sampler: put((token, found)), lambda text: put(Notice(text))
            )
            self._begun = True
        self._generation.future.add_done_callback(lambda _future: put(None))

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt were not computed again."""
        return self._generation.cached_tokens

    @property
    def reasoning_tokens(self) -> int:
        """In how many tokens the model has thought so far."""
        return self._answer.reasoning_tokens

    def prompt_piece(self) -> Choice:
        """The prompt as a piece before the first one, which has come; of a conversation without its text."""
        request = self._generation.request
        tokenizer, text = self._loaded.tokenizer, self._task.prompt
        if not text:
            text = tokenizer.decode(request.prompt, skip_special_tokens=True)
        elif not isinstance(text, str):
            text = ""
        if request.prompt_logprobs is None:
            return Choice(str(text), 0, None)
        logprobs = prompt_logprobs(tokenizer, request.prompt, self._generation.prompt_logprobs)
        return Choice(str(text), 0, None, logprobs)

    def cancel(self) -> None:
        """Cancels the generation and frees its memory, here and on the worker. It may not have begun."""
        with self._lock:
            self._cancelled = True
            begun = self._begun
        if begun and not self._generation.done:
            self._generation.cancel()

    async def pieces(self) -> AsyncIterator[Choice | Notice]:
        """The answer in pieces, and notices between them; the last piece has the finish reason.

        Raises the generation's error.
        """
        tokens = 0
        logprobs: list[TokenLogprobs] = []
        while not self._answer.stopped and (event := await self._events.get()) is not None:
            if isinstance(event, Notice):
                yield event
                continue
            token, found = event
            tokens += 1
            if found is not None:
                logprobs.append(self._logprobs.next(token, found))
            if piece := self._answer.push(token):
                yield self._piece(piece, tokens, None, logprobs)
                tokens, logprobs = 0, []
        if self._generation.error is not None:
            raise self._generation.error
        reason: str | None = "stop" if self._answer.stopped else self._generation.finish_reason
        self.cancel()
        last = self._answer.end()
        if reason == "stop" and self._answer.called:
            reason = "tool_calls"
        yield self._piece(last, tokens, reason, logprobs)

    async def whole(self) -> Choice:
        """The whole answer. Raises what `pieces` raises."""
        pieces = [piece async for piece in self.pieces() if isinstance(piece, Choice)]
        return Choice(
            "".join(piece.text for piece in pieces),
            sum(piece.tokens for piece in pieces),
            pieces[-1].finish_reason,
            [token for piece in pieces for token in piece.logprobs or ()] if self._wants_logprobs else None,
            "".join(piece.reasoning for piece in pieces),
            tuple(delta for piece in pieces for delta in piece.tool_calls),
            pieces[-1].stop_text,
            pieces[-1].reasoning_tokens,
        )

    def _piece(self, piece: AnswerPiece, tokens: int, reason: str | None, logprobs: list[TokenLogprobs]) -> Choice:
        logged = logprobs if self._wants_logprobs else None
        stop_text = self._answer.stopped_by if reason is not None else None
        thought = self.reasoning_tokens if reason is not None else 0
        return Choice(piece.text, tokens, reason, logged, piece.reasoning, piece.calls, stop_text, thought)
