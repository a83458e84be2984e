"""Parts of the HTTP server that need no model: unforeseen errors, too many clients, and whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from starlette.datastructures import Headers
from starlette.responses import Response

from split_common.errors import Busy, ConfigError
from split_device.images.settings import ImageSettings
from split_device.jobs.job import ModelChoice
from split_device.serving.fields import ApiError
from split_device.serving.guard import Guard
from split_device.serving.http import api_error, read_json
from split_device.serving.listener import running_server
from split_device.serving.openai.images import Images
from split_device.serving.openai.requests import COMPLETION_PATHS
from split_device.serving.server import CompletionServer
from split_device.serving.text_model import LONG, TextModel

#: Seconds that something may take on a busy machine.
PATIENCE = 300.0


@contextlib.contextmanager
def answering(complete: Any) -> Iterator[str]:
    """The address of a server whose completions are answered by a function."""
    dialect: Any = SimpleNamespace(handlers=lambda: {("POST", path): complete for path in COMPLETION_PATHS})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with running_server(CompletionServer(None, [dialect], None).app(), listener, threading.Event()):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_an_error_that_nobody_foresaw_is_an_object_without_the_prompt() -> None:
    async def complete(_request: Any) -> Response:
        raise ValueError("secret")

    with answering(complete) as url:
        failed = httpx2.post(f"{url}/completions", json={}, timeout=PATIENCE)
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "server_error"
    assert "secret" not in failed.text


def test_what_is_not_http_is_answered_by_an_object() -> None:
    async def complete(_request: Any) -> Response:
        raise AssertionError("it is a request")

    with answering(complete) as url, socket.create_connection(("127.0.0.1", int(url[17:-3])), PATIENCE) as client:
        client.sendall(b"no HTTP\r\n\r\n")
        received = b""
        while data := client.recv(65536):
            received += data
    assert received.startswith(b"HTTP/1.1 400 ")
    assert json.loads(received[received.index(b"{") :])["error"]["message"] == "Invalid HTTP request received."


def test_large_bodies_hold_up_no_small_one() -> None:
    """The large ones are parsed until the small one is, which comes last."""
    parts: Any = SimpleNamespace(adapters=SimpleNamespace(names=[]))
    loaded: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(chat_template=None),
        limit=1,
        model=SimpleNamespace(split_parts=parts),
        grammars=SimpleNamespace(prepare=lambda: None),
    )
    model, parsed = TextModel(loaded, ModelChoice(name="tiny"), "tiny"), threading.Event()

    def request(size: int) -> Any:
        async def stream() -> AsyncIterator[bytes]:
            yield b'"' + b" " * size + b'"'

        return SimpleNamespace(headers=Headers(), stream=stream)

    async def ask() -> None:
        large = [
            asyncio.create_task(model.parsed(request(LONG), lambda _: parsed.wait(PATIENCE))) for _ in range(64)
        ]
        try:
            await asyncio.wait_for(model.parsed(request(1), lambda _: parsed.set()), PATIENCE / 10)
        finally:
            parsed.set()
        assert all(await asyncio.gather(*large))

    asyncio.run(ask())


def test_a_body_that_does_not_arrive() -> None:
    async def complete(request: Any) -> Response:
        await read_json(request, timeout=0.05)
        raise AssertionError("it has arrived")

    with answering(complete) as url, socket.create_connection(("127.0.0.1", int(url[17:-3])), PATIENCE) as client:
        client.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"')
        received = b""
        while b"}}" not in received:
            received += client.recv(65536)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert "did not arrive within 0.05 s" in json.loads(received[received.index(b"{") :])["error"]["message"]


def test_too_many_requests_are_told_to_come_back() -> None:
    async def run() -> list[dict[str, Any]]:
        going_on = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await going_on.wait()
            await Response("done")(scope, receive, send)

        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(dict(message))

        guard = Guard(app, limit=2)
        scope = {"type": "http", "path": "/", "headers": [(b"host", b"localhost")]}
        waiting = [asyncio.create_task(guard(scope, None, send)) for _ in range(2)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await guard(scope, None, send)  # type: ignore[arg-type]
        going_on.set()
        await asyncio.gather(*waiting)
        await guard(scope, None, send)  # type: ignore[arg-type]
        return [message for message in sent if message["type"] == "http.response.start"]

    refused, *answered = asyncio.run(run())
    assert refused["status"] == 503
    assert (b"retry-after", b"1") in refused["headers"]
    assert [message["status"] for message in answered] == [200, 200, 200]


def test_an_error_says_when_to_come_back() -> None:
    assert api_error(Busy("all workers are full", 1.2)).headers == {"Retry-After": "2"}
    assert api_error(ConfigError("no")).headers is None
    assert isinstance(api_error(ValueError("no")), ApiError)


def test_images_wait_for_their_turn_without_a_thread() -> None:
    started: list[Future[int]] = []

    class Pipeline:
        def start(self, _prompt: str, _settings: ImageSettings, _id: str, _index: int, _on_notice: Any) -> Any:
            future: Future[int] = Future()
            future.set_running_or_notify_cancel()
            started.append(future)
            return SimpleNamespace(future=future, cancel=lambda: None)

    async def run() -> None:
        pipeline: Any = Pipeline()
        images = Images(pipeline, "m", 2)
        asked = [asyncio.create_task(images._image("x", ImageSettings(), "r", index)) for index in range(5)]
        asked.pop().cancel()
        for index in range(4):
            while len(started) <= index:
                assert not asked[index].done()
                await asyncio.sleep(0)
            assert len(started) <= index + 2
            started[index].set_result(index)
        assert await asyncio.gather(*asked) == [0, 1, 2, 3]

    asyncio.run(run())
    assert len(started) == 4


@pytest.mark.parametrize("origin", ["http://LOCALHOST:80", "http://localhost:80"])
def test_an_origin_has_no_case(origin: str) -> None:
    async def complete(_request: Any) -> Response:
        return Response("{}")

    with answering(complete) as url:
        headers = {"Host": "Localhost:80", "Origin": origin}
        assert httpx2.post(f"{url}/completions", headers=headers, timeout=PATIENCE).status_code == 200
