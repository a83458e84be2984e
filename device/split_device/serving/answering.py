"""The choices of an answer under way: awaited whole, or sent as events, and ended when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from split_device.serving.choices import Choice
from split_device.serving.http import json_pieces, unless_disconnected
from split_device.serving.streaming import ChoiceStream, Notice


class Answer:
    """The choices of one answer, in any dialect. A context manager: what was not handed on ends with it."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._streamed = False
        #: The choices in their order.
        self.streams: list[ChoiceStream] = []

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._streamed:
            self.cancel()

    async def whole(self) -> list[Choice]:
        """All choices. Raises ClientDisconnect when the client leaves, and what `ChoiceStream.whole` raises."""
        return await unless_disconnected(
            self._request, asyncio.gather(*(stream.whole() for stream in self.streams))
        )

    async def pieces(self) -> AsyncIterator[tuple[int, Choice | Notice]]:
        """Pieces of all choices and notices in order of arrival, with the index of the choice.

        Raises the error of a choice.
        """
        ready: asyncio.Queue[tuple[int, Choice | Notice | BaseException | None]] = asyncio.Queue()

        async def forward(index: int, stream: ChoiceStream) -> None:
            try:
                async for piece in stream.pieces():
                    ready.put_nowait((index, piece))
                ready.put_nowait((index, None))
            except Exception as error:
                ready.put_nowait((index, error))

        forwarders = [asyncio.create_task(forward(*each)) for each in enumerate(self.streams)]
        try:
            remaining = len(forwarders)
            while remaining:
                index, piece = await ready.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    remaining -= 1
                else:
                    yield index, piece
        finally:
            for forwarder in forwarders:
                forwarder.cancel()

    def events(self, events: AsyncIterator[str]) -> Response:
        """A response of server-sent events, with which the choices end."""
        self._streamed = True
        return _Events(events, self)

    def cancel(self) -> None:
        """Ends all choices, here and on the worker."""
        for stream in self.streams:
            stream.cancel()


class _Events(StreamingResponse):
    """Server-sent events. Cancels the generations at the end, even if the client left before the first event."""

    def __init__(self, events: AsyncIterator[str], answer: Answer) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def comment(notice: Notice) -> str:
    """A notice as a line of the stream that clients pass over, unless they look for it."""
    return f": {' '.join(notice.text.split())}\n\n"


def event(data: dict[str, Any], name: str | None = None, depth: int = 0) -> str:
    """An event of JSON, with a name of its own in dialects that have such. `depth` is that of `json_pieces`."""
    return (f"event: {name}\n" if name else "") + f"data: {''.join(json_pieces(data, depth))}\n\n"
