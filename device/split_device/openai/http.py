"""What the server's endpoints share: bodies, clients that leave, and errors as OpenAI says them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from split_common.errors import (
    BrokerUnreachable,
    Busy,
    ConfigError,
    NoWorker,
    Oversized,
    PromptTooLong,
    SplitError,
    UnsupportedFeature,
)
from split_device.openai.requests import ApiError

log = logging.getLogger(__name__)

#: Bytes of a request's body, at most.
MAX_BODY = 4 * 1024**2

#: What nginx says of a client that has left; nobody reads it.
LEFT = 499

_T = TypeVar("_T")


async def read_json(request: Request) -> object:
    """Raises ApiError."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY:
            raise ApiError(f"the body has more than {MAX_BODY} bytes", 413)
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError("the body is not JSON") from None


async def unless_disconnected(request: Request, answer: Awaitable[_T]) -> _T:
    """Waits for an answer as long as the client does. Raises ClientDisconnect."""
    waiting = asyncio.ensure_future(answer)
    # Else asyncio complains of what became of it after the client had left.
    waiting.add_done_callback(lambda future: future.cancelled() or future.exception())
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


async def refuse(_request: Request, error: Exception) -> Response:
    """The answer to a request that has failed."""
    found = api_error(error)
    return JSONResponse({"error": found.fields()}, found.status)


def api_error(error: BaseException) -> ApiError:
    """Any error as OpenAI says it."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.detail, error.status_code)
        case PromptTooLong():
            return ApiError(str(error), code="context_length_exceeded")
        case ConfigError() | UnsupportedFeature() | Oversized():
            return ApiError(str(error))
        case Busy() | NoWorker() | BrokerUnreachable():
            return ApiError(str(error), 503, type_="server_error", code=type(error).__name__)
        case SplitError():
            return ApiError(str(error), 500, type_="server_error", code=type(error).__name__)
        case _:
            log.error("a request failed by an unexpected %s", type(error).__name__)
            return ApiError("an unexpected error", 500, type_="server_error")
