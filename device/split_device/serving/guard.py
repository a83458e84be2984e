"""What every request passes before it is answered: the names of the host, the API key, and how many there are."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from split_device.serving.fields import ApiError
from split_device.serving.hosts import HOSTS, check_host, host_name
from split_device.serving.http import REQUEST_ID, refusal

#: How many requests may be in progress at once.
MAX_REQUESTS = 512

#: Seconds after which a client may ask again when there are too many requests.
RETRY_AFTER = 1


class Guard:
    """Refuses requests under other host names, and those that are too many. Used from one event loop.

    Args:
        hosts: names that requests may have, beside those of the loopback.
        limit: how many requests may be in progress at once.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] = (), limit: int = MAX_REQUESTS) -> None:
        self._app = app
        self._hosts = [*HOSTS, *map(check_host, hosts)]
        self._limit = limit
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refusal(scope) if scope["type"] == "http" else None
        if refused is not None:
            await refusal(refused, scope["path"], scope.get(REQUEST_ID, ""))(scope, receive, send)
            return
        self._requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        given = Headers(scope=scope).get("host", "")
        if host_name(given) not in self._hosts:
            message = (
                f"the host name {given!r} is not allowed here, only {', '.join(self._hosts)}: "
                "`lambda-split serve --allowed-host NAME` allows another one"
            )
            return ApiError(message, code="invalid_host")
        if self._requests >= self._limit:
            return ApiError(
                f"{self._limit} requests are in progress already",
                503,
                type_="server_error",
                code="Busy",
                headers={"Retry-After": str(RETRY_AFTER)},
            )
        return None


def check_origin(headers: Headers) -> None:
    """Raises ApiError for a request from a page of another origin: a browser sends those of any page."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
        raise ApiError("requests from pages of other origins are refused", 403)


def check_key(headers: Headers, keys: Sequence[str]) -> None:
    """Raises ApiError unless one of the keys comes as bearer token or `x-api-key`. Without keys, none is needed."""
    scheme, _, given = headers.get("authorization", "").strip().partition(" ")
    found = [given.strip()] if scheme.lower() == "bearer" else []
    found += headers.getlist("x-api-key")
    known = [hmac.compare_digest(each.encode(), key.encode()) for each in found for key in keys]
    if keys and not any(known):
        challenge = {"WWW-Authenticate": "Bearer"}
        raise ApiError("the API key is wrong or missing", 401, code="invalid_api_key", headers=challenge)
