"""Chat and text completions by a language model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from split_common.system.text import json_line
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.settings import Sampling
from split_device.jobs.job import ModelChoice
from split_device.jobs.models import Loaded
from split_device.serving.http import (
    CLIENT_CLOSED_REQUEST,
    api_error,
    json_response,
    read_json,
    unless_disconnected,
)
from split_device.serving.openai.requests import COMPLETION_PATHS, Query, check_model, parse
from split_device.serving.openai.responses import chunk, completion, usage_chunk
from split_device.serving.request_ids import request_id
from split_device.serving.streaming import ChoiceStream, Notice


class Completions:
    """Answers requests with a loaded model.

    Args:
        name: what clients call the model.
        defaults: the temperature, top_p and top_k of requests that name none; None for the checkpoint's.
        template: how conversations become prompts.

    Raises:
        ConfigError: the template is not one, or does not read a variable that is set.
    """

    def __init__(
        self,
        loaded: Loaded,
        choice: ModelChoice,
        name: str,
        defaults: Sampling = Sampling(),
        template: ChatTemplate = ChatTemplate(),
    ) -> None:
        template.check(loaded.tokenizer)
        self.name = name
        self._loaded = loaded
        self._choice = choice
        #: What clients call the model with each adapter: the adapter's name.
        self.adapters: list[str] = loaded.model.split_parts.adapters.names
        self._defaults = defaults
        self._template = template
        #: One thread: a tokenizer may not be called by several at once.
        self._encoding = ThreadPoolExecutor(1, "encoding")

    @property
    def names(self) -> list[str]:
        """The names by which requests choose the model alone, or with one of its adapters."""
        return [self.name, *self.adapters]

    def parts(self) -> list[dict[str, Any]]:
        """Which layers run where."""
        split = self._loaded.model.split
        parts = (
            ("head", "device", 0, split.first),
            ("body", "worker", split.first, split.last),
            ("tail", "device", split.last, split.layers),
        )
        return [dict(zip(("name", "where", "first", "last"), part, strict=True)) for part in parts]

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer."""
        return self._loaded.limit

    def traffic(self) -> dict[str, int]:
        """What left this device since the start, summed over all requests."""
        traffic = self._loaded.model.traffic
        return {
            "steps": self._loaded.generator.counters["steps"],
            "bytes_sent": traffic["bytes_sent"],
            "bytes_received": traffic["bytes_received"],
        }

    def sampling(self) -> Sampling:
        """The temperature, top_p and top_k of a request that names none."""
        return self._defaults.resolved(self._loaded.model.generation_config)

    async def complete(self, request: Request) -> Response:
        """Answers a request. Raises ApiError, and other errors that `api_error` reports to the client."""
        streams: list[ChoiceStream] = []
        try:
            query = parse(
                COMPLETION_PATHS[request.url.path],
                await read_json(request),
                self._choice,
                self._defaults,
                self._template,
            )
            check_model(query.model, self.names)
            adapter = query.model if query.model != self.name else ""
            # All choices have one prompt. A long one takes seconds, in which other requests go on.
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(
                self._encoding, self._loaded.encode, query.tasks[0], query.continues
            )
            # As in vLLM, the id of the answer is that of the request, behind its kind.
            id_, created = request_id(request), int(time.time())
            for index, task in enumerate(query.tasks):
                streams.append(
                    ChoiceStream(self._loaded, task, prompt, query.logprobs, query.continues, id_, index, adapter)
                )
            if query.stream:
                events = self._events(query, streams, id_, created)
                return _Events(events, streams)
            whole = asyncio.gather(*(stream.whole() for stream in streams))
            choices = await unless_disconnected(request, whole)
        except ClientDisconnect:
            _cancel(streams)
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            _cancel(streams)
            raise
        return json_response(completion(query.kind, id_, created, query.model, streams[0].prompt_tokens, choices))

    async def _events(
        self, query: Query, streams: list[ChoiceStream], id_: str, created: int
    ) -> AsyncIterator[str]:
        """Server-sent events of all choices, in order of arrival. If the client leaves, the generations end."""
        ready: asyncio.Queue[dict[str, Any] | Notice | BaseException | None] = asyncio.Queue()
        tokens = 0

        async def forward(index: int, stream: ChoiceStream) -> None:
            nonlocal tokens
            first = True
            try:
                async for piece in stream.pieces():
                    if isinstance(piece, Notice):
                        ready.put_nowait(piece)
                        continue
                    tokens += piece.tokens
                    ready.put_nowait(chunk(query.kind, id_, created, query.model, index, piece, first))
                    first = False
                ready.put_nowait(None)
            except Exception as error:
                ready.put_nowait(error)

        forwarders = [asyncio.create_task(forward(*each)) for each in enumerate(streams)]
        try:
            remaining = len(forwarders)
            while remaining:
                event = await ready.get()
                if isinstance(event, BaseException):
                    yield _event({"error": api_error(event).fields()})
                    return
                if event is None:
                    remaining -= 1
                elif isinstance(event, Notice):
                    yield _comment(event.text)
                else:
                    yield _event(event)
            if query.include_usage:
                prompt_tokens = streams[0].prompt_tokens
                yield _event(usage_chunk(query.kind, id_, created, query.model, prompt_tokens, tokens))
            yield "data: [DONE]\n\n"
        finally:
            for forwarder in forwarders:
                forwarder.cancel()


class _Events(StreamingResponse):
    """Server-sent events. Cancels the generations at the end, even if the client left before the first event."""

    def __init__(self, events: AsyncIterator[str], streams: list[ChoiceStream]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._streams)


def _cancel(streams: list[ChoiceStream]) -> None:
    for stream in streams:
        stream.cancel()


def _comment(text: str) -> str:
    """A line of the stream that clients pass over, unless they look for it."""
    return f": {' '.join(text.split())}\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json_line(data)}\n\n"
