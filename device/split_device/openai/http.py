"""What the endpoints share: request bodies, clients that disconnect, and errors in OpenAI's format."""

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

#: Largest body of a request, in bytes.
MAX_REQUEST_BODY = 4 * 1024**2

#: nginx's status code for a client that closed the connection; it only shows in logs.
CLIENT_CLOSED_REQUEST = 499

_T = TypeVar("_T")


async def read_json(request: Request) -> object:
    """The body of a request as JSON. Raises ApiError if it is too large or malformed."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_REQUEST_BODY:
            raise ApiError(f"the body has more than {MAX_REQUEST_BODY} bytes", 413)
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError("the body is not JSON") from None


async def unless_disconnected(request: Request, answer: Awaitable[_T]) -> _T:
    """Awaits an answer while the client stays connected. Raises ClientDisconnect when it leaves."""
    waiting = asyncio.ensure_future(answer)
    # Retrieves the exception of an abandoned answer, about which asyncio would warn.
    waiting.add_done_callback(lambda future: future.cancelled() or future.exception())
    # The only message after the body says that the client has disconnected.
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
    """The response to a request that failed."""
    found = api_error(error)
    return JSONResponse({"error": found.fields()}, found.status)


def api_error(error: BaseException) -> ApiError:
    """Any exception as an error of OpenAI's format."""
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
