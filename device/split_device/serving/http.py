"""What the endpoints share: request bodies, clients that disconnect, and errors in OpenAI's format."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from split_common.errors import (
    BrokerUnreachable,
    Busy,
    ConfigError,
    NoWorker,
    Oversized,
    PromptTooLong,
    SplitError,
    UnsupportedFeature,
    UnsupportedField,
)
from split_common.system.text import json_line, parse_json
from split_device.serving.anthropic.errors import MESSAGES_PATH, error_object
from split_device.serving.fields import ApiError

log = logging.getLogger(__name__)

#: Largest body of a request, in bytes.
MAX_REQUEST_BODY = 4 * 1024**2

#: How long a client may take to send the body of a request, in seconds.
BODY_TIMEOUT = 30.0

#: nginx's status code for a client that closed the connection; it only shows in logs.
CLIENT_CLOSED_REQUEST = 499

#: What is said of requests that no handler gets, by status code.
_UNROUTED = {404: "there is no {path} here", 405: "{path} does not answer {method}"}

#: Where the scope of a request keeps its id.
REQUEST_ID = "lambda_split.request_id"

#: How many values without values of their own are written as JSON at once; and down to which depth JSON is divided,
#: which is that of the tokens in an answer with log probabilities.
PIECE = 4096
PIECES_DEPTH = 5

#: Answers a request.
Handler = Callable[[Request], Awaitable[Response]]

_T = TypeVar("_T")


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None, depth: int = PIECES_DEPTH
) -> Response:
    """A response of JSON, which is on one line for any reader of lines. `depth` is that of `json_pieces`."""
    return Response("".join(json_pieces(content, depth)), status, headers, "application/json")


def json_pieces(content: object, depth: int = PIECES_DEPTH) -> Iterator[str]:
    """JSON on one line, in pieces. No other thread runs while one is written, so that none is large.

    Args:
        depth: down to which depth objects and arrays are divided.
    """
    if not depth or not isinstance(content, dict | list) or not content:
        yield json_line(content)
    elif isinstance(content, dict):
        for index, (name, value) in enumerate(content.items()):
            yield f"{', ' if index else '{'}{json_line({name: 0})[1:-2]}"
            yield from json_pieces(value, depth - 1)
        yield "}"
    elif any(isinstance(each, dict | list) for each in content):
        for index, value in enumerate(content):
            yield ", " if index else "["
            yield from json_pieces(value, depth - 1)
        yield "]"
    else:
        for index in range(0, len(content), PIECE):
            yield f"{', ' if index else '['}{json_line(content[index : index + PIECE])[1:-1]}"
        yield "]"


async def read_json(request: Request, timeout: float = BODY_TIMEOUT) -> object:
    """The body of a request as JSON in UTF-8. Raises what `read_body` and `parse_body` raise."""
    return parse_body(await read_body(request, timeout))


def parse_body(data: bytes | bytearray) -> object:
    """The body of a request as JSON. Raises ConfigError if it is not JSON in UTF-8."""
    return parse_json(data, "the body")


async def read_body(request: Request, timeout: float = BODY_TIMEOUT) -> bytearray:
    """The body of a request.

    Args:
        timeout: how long the client may take to send it, in seconds.

    Raises:
        ApiError: it is too large, late or encoded.
    """
    _check_encoding(request.headers)
    if int(request.headers.get("content-length", 0)) > MAX_REQUEST_BODY:
        raise _too_large()
    data = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                data += part
                if len(data) > MAX_REQUEST_BODY:
                    raise _too_large()
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {timeout:g} s", 408) from None
    return data


def _too_large() -> ApiError:
    return ApiError(f"the body has more than {MAX_REQUEST_BODY} bytes", 413)


def _check_encoding(headers: Headers) -> None:
    """Raises ApiError for a body that is compressed, or not in UTF-8."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(f"a body with Content-Encoding {encoding!r} is not supported", 415)
    charset = re.search(r"""charset\s*=\s*["']?([^\s;"']+)""", headers.get("content-type", ""), re.IGNORECASE)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(f"a body in {charset[1]} is not supported: JSON is UTF-8", 415)


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


async def refuse(request: Request, error: Exception) -> Response:
    """The response to a request that failed; one that nobody gets if the client left."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    found = api_error(error)
    if isinstance(error, HTTPException) and error.status_code in _UNROUTED:
        found = ApiError(
            _UNROUTED[error.status_code].format(path=request.url.path, method=request.method),
            error.status_code,
            headers=error.headers,
        )
    return refusal(found, request.url.path, request.scope.get(REQUEST_ID, ""))


def refusal(error: ApiError, path: str, request_id: str) -> Response:
    """An error as a response, in the format of the dialect that the path belongs to."""
    anthropic = path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")
    body = error_object(error, request_id) if anthropic else {"error": error.fields()}
    return json_response(body, error.status, error.headers)


def api_error(error: BaseException) -> ApiError:
    """Any exception as an error of OpenAI's format."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            return ApiError(error.detail, error.status_code, headers=error.headers)
        case PromptTooLong():
            return ApiError(str(error), code="context_length_exceeded")
        case UnsupportedField():
            return ApiError(str(error), param=error.field, code="unsupported_parameter")
        case ConfigError() | UnsupportedFeature() | Oversized():
            return ApiError(str(error))
        case Busy() | NoWorker() | BrokerUnreachable():
            later = None if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
            return ApiError(str(error), 503, type_="server_error", code=type(error).__name__, headers=later)
        case SplitError():
            return ApiError(str(error), 500, type_="server_error", code=type(error).__name__)
        case _:
            log.error("a request failed with an unexpected %s", type(error).__name__)
            return ApiError("an unexpected error", 500, type_="server_error")
