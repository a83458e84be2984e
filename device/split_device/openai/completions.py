"""Chat and text completions by a language model."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from split_device.jobs.job import ModelChoice
from split_device.jobs.models import Loaded
from split_device.openai.http import CLIENT_CLOSED_REQUEST, api_error, read_json, unless_disconnected
from split_device.openai.requests import COMPLETION_PATHS, Query, check_model, parse
from split_device.openai.responses import chunk, completion, usage_chunk
from split_device.openai.streaming import Answering


class Completions:
    """Answers requests with a loaded model.

    Args:
        name: what clients call the model.
    """

    def __init__(self, loaded: Loaded, choice: ModelChoice, name: str) -> None:
        self.name = name
        self._loaded = loaded
        self._choice = choice

    def parts(self) -> list[dict[str, Any]]:
        """Which layers run where."""
        split = self._loaded.model.split
        parts = (
            ("head", "device", 0, split.first),
            ("body", "worker", split.first, split.last),
            ("tail", "device", split.last, split.layers),
        )
        return [dict(zip(("name", "where", "first", "last"), part, strict=True)) for part in parts]

    def traffic(self) -> dict[str, int]:
        """What left this device since the start, summed over all requests."""
        traffic = self._loaded.model.traffic
        return {
            "steps": self._loaded.generator.counters["steps"],
            "bytes_sent": traffic["bytes_sent"],
            "bytes_received": traffic["bytes_received"],
        }

    async def complete(self, request: Request) -> Response:
        """Answers a request. Raises ApiError, and other errors that `api_error` reports to the client."""
        answerings: list[Answering] = []
        try:
            query = parse(COMPLETION_PATHS[request.url.path], await read_json(request), self._choice)
            check_model(query.model, self.name)
            for task in query.tasks:
                answerings.append(Answering(self._loaded, task, query.logprobs))
            id_, created = secrets.token_hex(12), int(time.time())
            if query.stream:
                stream = self._stream(query, answerings, id_, created)
                return _Events(stream, answerings)
            whole = asyncio.gather(*(answering.whole() for answering in answerings))
            choices = await unless_disconnected(request, whole)
        except ClientDisconnect:
            _cancel(answerings)
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            _cancel(answerings)
            raise
        return JSONResponse(completion(query.kind, id_, created, self.name, answerings[0].prompt_tokens, choices))

    async def _stream(
        self, query: Query, answerings: list[Answering], id_: str, created: int
    ) -> AsyncIterator[str]:
        """Server-sent events of all choices, in order of arrival. If the client leaves, the generations end."""
        ready: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()
        tokens = 0

        async def follow(index: int, answering: Answering) -> None:
            nonlocal tokens
            first = True
            try:
                async for piece in answering.pieces():
                    tokens += piece.tokens
                    ready.put_nowait(chunk(query.kind, id_, created, self.name, index, piece, first))
                    first = False
                ready.put_nowait(None)
            except Exception as error:
                ready.put_nowait(error)

        followers = [asyncio.create_task(follow(*each)) for each in enumerate(answerings)]
        try:
            left = len(followers)
            while left:
                event = await ready.get()
                if isinstance(event, BaseException):
                    yield _event({"error": api_error(event).fields()})
                    return
                if event is None:
                    left -= 1
                else:
                    yield _event(event)
            if query.include_usage:
                prompt_tokens = answerings[0].prompt_tokens
                yield _event(usage_chunk(query.kind, id_, created, self.name, prompt_tokens, tokens))
            yield "data: [DONE]\n\n"
        finally:
            for follower in followers:
                follower.cancel()


class _Events(StreamingResponse):
    """Server-sent events. Cancels the generations at the end, even if the client left before the first event."""

    def __init__(self, events: AsyncIterator[str], answerings: list[Answering]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answerings = answerings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._answerings)


def _cancel(answerings: list[Answering]) -> None:
    for answering in answerings:
        answering.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
