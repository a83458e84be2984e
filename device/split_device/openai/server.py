"""An HTTP server for OpenAI's clients: chat and text completions by one split model."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from split_common.errors import BrokerUnreachable, Busy, ConfigError, NoWorker, PromptTooLong, SplitError
from split_device.jobs.job import ModelChoice
from split_device.jobs.models import Loaded
from split_device.openai import page
from split_device.openai.answering import Answering
from split_device.openai.answers import chunk, completion, usage_chunk
from split_device.openai.requests import KINDS, ApiError, Query, parse

log = logging.getLogger(__name__)

#: Bytes of a request's body, at most.
MAX_BODY = 4 * 1024**2

#: What nginx says of a client that has left; nobody reads it.
LEFT = 499

#: Names that this machine is called by: what a web page elsewhere makes a browser send has another one.
HOSTS = ("127.0.0.1", "localhost")

_T = TypeVar("_T")


class Server:
    """Answers requests with a model that is loaded.

    Args:
        name: what clients call the model.
        api_key: what they must know; None for none.
    """

    def __init__(self, loaded: Loaded, choice: ModelChoice, name: str, api_key: str | None) -> None:
        self._loaded = loaded
        self._choice = choice
        self._name = name
        self._api_key = api_key
        self._began = int(time.time())

    def app(self) -> Starlette:
        routes = [
            *(Route(path, self._complete, methods=["POST"]) for path in KINDS),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/split", self._split),
            *page.routes(),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))],
            exception_handlers={SplitError: _refuse, HTTPException: _refuse, Exception: _refuse},
        )

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _split(self, request: Request) -> Response:
        """Which layers run where, and what has left this device since the start, for all requests together."""
        self._authorize(request)
        model, generator = self._loaded.model, self._loaded.generator
        first, last, layers = model.split.first, model.split.last, model.split.layers
        traffic = model.traffic
        parts = (("head", "device", 0, first), ("body", "worker", first, last), ("tail", "device", last, layers))
        return JSONResponse(
            {
                "model": self._name,
                "parts": [dict(zip(("name", "where", "first", "last"), part, strict=True)) for part in parts],
                "traffic": {
                    "steps": generator.counters["steps"],
                    "bytes_sent": traffic["bytes_sent"],
                    "bytes_received": traffic["bytes_received"],
                },
            }
        )

    async def _models(self, request: Request) -> Response:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._authorize(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    async def _complete(self, request: Request) -> Response:
        self._authorize(request)
        answerings: list[Answering] = []
        try:
            query = parse(KINDS[request.url.path], await _body(request), self._choice)
            self._check_model(query.model)
            for task in query.tasks:
                answerings.append(Answering(self._loaded, task, query.logprobs))
            id_, created = secrets.token_hex(12), int(time.time())
            if query.stream:
                stream = self._stream(query, answerings, id_, created)
                return _Events(stream, answerings)
            whole = asyncio.gather(*(answering.whole() for answering in answerings))
            choices = await _unless_disconnected(request, whole)
        except ClientDisconnect:
            _cancel(answerings)
            return Response(status_code=LEFT)
        except BaseException:
            _cancel(answerings)
            raise
        return JSONResponse(completion(query.kind, id_, created, self._name, answerings[0].prompt_tokens, choices))

    async def _stream(
        self, query: Query, answerings: list[Answering], id_: str, created: int
    ) -> AsyncIterator[str]:
        """Server-sent events; all choices as their pieces come. A client that leaves ends the generations."""
        ready: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()
        tokens = 0

        async def follow(index: int, answering: Answering) -> None:
            nonlocal tokens
            first = True
            try:
                async for piece in answering.pieces():
                    tokens += piece.tokens
                    ready.put_nowait(chunk(query.kind, id_, created, self._name, index, piece, first))
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
                    yield _event({"error": _api_error(event).fields()})
                    return
                if event is None:
                    left -= 1
                else:
                    yield _event(event)
            if query.include_usage:
                prompt_tokens = answerings[0].prompt_tokens
                yield _event(usage_chunk(query.kind, id_, created, self._name, prompt_tokens, tokens))
            yield "data: [DONE]\n\n"
        finally:
            for follower in followers:
                follower.cancel()

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._api_key is not None and not hmac.compare_digest(given.encode(), self._api_key.encode()):
            raise ApiError("the API key is wrong or missing", 401, code="invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise ApiError(f"the model here is {self._name}", 404, param="model", code="model_not_found")

    def _card(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._began, "owned_by": "lambda-split"}


class _Events(StreamingResponse):
    """Server-sent events, after which no generation is left, also if the client left before the first one."""

    def __init__(self, events: AsyncIterator[str], answerings: list[Answering]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answerings = answerings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._answerings)


async def _body(request: Request) -> object:
    """Raises ApiError."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise ApiError(f"the body has more than {MAX_BODY} bytes", 413)
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError("the body is no JSON") from None


async def _unless_disconnected(request: Request, answer: Awaitable[_T]) -> _T:
    """Waits for an answer as long as the client does. Raises ClientDisconnect."""
    waiting = asyncio.ensure_future(answer)
    # After the body comes one message: that the client has left.
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        waiting.cancel()
        leaving.cancel()


def _cancel(answerings: list[Answering]) -> None:
    for answering in answerings:
        answering.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _refuse(_request: Request, error: Exception) -> Response:
    api_error = _api_error(error)
    return JSONResponse({"error": api_error.fields()}, api_error.status)


def _api_error(error: BaseException) -> ApiError:
    """Any error as OpenAI says it."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.detail, error.status_code)
        case PromptTooLong():
            return ApiError(str(error), code="context_length_exceeded")
        case ConfigError():
            return ApiError(str(error))
        case Busy() | NoWorker() | BrokerUnreachable():
            return ApiError(str(error), 503, type_="server_error", code=type(error).__name__)
        case SplitError():
            return ApiError(str(error), 500, type_="server_error", code=type(error).__name__)
        case _:
            log.error("a request failed by an unexpected %s", type(error).__name__)
            return ApiError("an unexpected error", 500, type_="server_error")
