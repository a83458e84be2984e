"""The id of each request of HTTP: the client's own (`X-Request-Id`) or a new one, returned with every answer."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from split_common.errors import ConfigError
from split_device.serving.fields import ApiError
from split_device.serving.http import REQUEST_ID, refusal
from split_device.sessions.identity import check_request_id, new_request_id

#: The header in which clients give ids, and answers return them.
HEADER = "X-Request-Id"


class RequestIds:
    """Gives each request an id, around an application. An id that is not one is refused, under a new id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER)
        refused: ApiError | None = None
        try:
            id_ = new_request_id() if given is None else check_request_id(given)
        except ConfigError as error:
            id_, refused = new_request_id(), ApiError(str(error), param=HEADER, code="invalid_request_id")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = id_
            await send(message)

        if refused is not None:
            await refusal(refused, scope["path"], id_)(scope, receive, send_with_id)
            return
        await self._app({**scope, REQUEST_ID: id_}, receive, send_with_id)


def request_id(request: Request) -> str:
    """The id of a request that came through `RequestIds`."""
    id_: Any = request.scope[REQUEST_ID]
    return str(id_)
