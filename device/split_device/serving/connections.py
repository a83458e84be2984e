"""HTTP connections of which there are not too many, and which do not stay without a request."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from split_common.system.text import json_line
from split_device.serving.fields import ApiError

#: How long a client may take to send the head of a request, in seconds. It is closed within two such intervals.
HEAD_TIMEOUT = 10.0

#: How many connections there may be: fewer than the usual limit of open files, 1,024.
MAX_CONNECTIONS = 768


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, bounded. Runs in the event loop.

    Args:
        head_timeout: how long a client may take to send the head of a request, in seconds.
        most: how many connections there may be; further ones are closed at once.
    """

    def __init__(self, *args: Any, head_timeout: float, most: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timeout = head_timeout
        self._most = most
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP by an error object, and closes the connection."""
        body = json_line({"error": ApiError(msg).fields()}).encode()
        headers = [("Content-Type", "application/json"), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def _watch(self) -> None:
        self._timer = self.loop.call_later(self._head_timeout, self._check, self.cycle)

    def _check(self, earlier: object) -> None:
        """Closes the connection if no request was under way or came since the last check."""
        if self.cycle is earlier and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            self._watch()


def bounded(head_timeout: float = HEAD_TIMEOUT, most: int = MAX_CONNECTIONS) -> Any:
    """The protocol for uvicorn's setting `http`. Arguments are those of `BoundedProtocol`."""
    return functools.partial(BoundedProtocol, head_timeout=head_timeout, most=most)
