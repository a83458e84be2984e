"""A request's id from the client to the logs of device, worker and broker."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from starlette.responses import Response
from transformers import DynamicCache, GenerationConfig

import fleet
import tiny
from split_common.errors import ConfigError
from split_device import Generator, Request
from split_device.serving.listener import listening, running_server
from split_device.serving.openai.requests import COMPLETION_PATHS
from split_device.serving.request_ids import request_id
from split_device.serving.server import CompletionServer

#: Seconds that something may take on a busy machine.
PATIENCE = 300.0

PROMPT = torch.arange(3, 12)[None]

#: What a device logs of a session that it opens: the id, and what its worker calls it.
OPENED = re.compile(r"request (\S+), session ([0-9a-f]{8}): on worker \S+")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that answers with the id of the request, or fails."""

    async def complete(request: Any) -> Response:
        if request.url.path.endswith("/chat/completions"):
            raise ValueError("unforeseen")
        return Response(request_id(request))

    dialect: Any = SimpleNamespace(handlers=lambda: {("POST", path): complete for path in COMPLETION_PATHS})
    app = CompletionServer(None, [dialect], None).app()
    with listening(0) as listener, running_server(app, listener, threading.Event()):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def ask(url: str, *ids: str, path: str = "/v1/completions", host: str | None = None) -> httpx2.Response:
    headers = [("X-Request-Id", id_) for id_ in ids] + ([("Host", host)] if host else [])
    return httpx2.post(f"{url}{path}", json={}, headers=headers, timeout=PATIENCE)


def test_a_client_s_id_is_returned_with_every_answer(url: str) -> None:
    for id_ in ("mine", "x" * 128, "trace:1/2"):
        answer = ask(url, id_)
        assert (answer.status_code, answer.headers["x-request-id"], answer.text) == (200, id_, id_)
    for path, host, status in (
        ("/v1/chat/completions", None, 500),
        ("/made-up", None, 404),
        ("/health", None, 405),
        ("/v1/completions", "evil.example", 400),
    ):
        answer = ask(url, "mine", path=path, host=host)
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")


def test_a_request_without_an_id_gets_one(url: str) -> None:
    ids = [ask(url).headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(re.fullmatch("[0-9a-f]{32}", id_) for id_ in ids)
    assert re.fullmatch("[0-9a-f]{32}", ask(url, path="/made-up").headers["x-request-id"])


@pytest.mark.parametrize("wrong", ["x" * 129, "a b", "tab\tbed", ""])
def test_what_is_not_an_id_is_refused_under_another_one(url: str, wrong: str) -> None:
    refused = ask(url, wrong)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_request_id", "X-Request-Id")
    assert re.fullmatch("[0-9a-f]{32}", refused.headers["x-request-id"])


# --- from Python to the worker's log -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A checkpoint, and the broker of a worker that serves it."""
    checkpoint = tiny.save("llama", tmp_path_factory.mktemp("llama"))
    with fleet.running_broker() as broker:
        worker = fleet.start_worker(checkpoint, broker.address)
        try:
            yield checkpoint, broker.address
        finally:
            worker.stop()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def opened(logged: pytest.LogCaptureFixture, logger: str) -> list[str]:
    return [record.message for record in logged.records if record.name.startswith(logger)]


def test_logs_join_a_request_and_its_sessions(served: tuple[Path, str], logged: pytest.LogCaptureFixture) -> None:
    from split_device import SplitModelForCausalLM

    greedy = {"do_sample": False, "max_new_tokens": 2}
    with SplitModelForCausalLM.from_pretrained(served[0], broker=served[1]) as model:
        model.generate(PROMPT, request_id="mine", **greedy)
        model.generate(PROMPT, request_id="mine", **greedy)
        model.generate(PROMPT, **greedy)
        cache = DynamicCache()
        model.generate(PROMPT, past_key_values=cache, request_id="cached", **greedy)
        with Generator(model) as generator:
            request = Request(PROMPT[0].tolist(), GenerationConfig(**greedy), request_id="many", index=1)
            generation = generator.submit(request)
            assert generation.session is None or len(generation.session) == 8
            generation.result(PATIENCE)
            with pytest.raises(ConfigError, match="invalid request id"):
                generator.submit(Request(PROMPT[0].tolist(), request_id="a b"))
        with pytest.raises(ConfigError, match="invalid request id"):
            model.generate(PROMPT, request_id="", **greedy)
    found = [match.groups() for line in opened(logged, "split_device") if (match := OPENED.fullmatch(line))]
    ids, keys = [id_ for id_, _ in found], [key for _, key in found]
    assert (ids[:2], ids[3:]) == (["mine", "mine"], ["cached", "many"])
    assert (generation.request_id, generation.session) == found[-1]
    # The same id twice is two sessions.
    assert len(set(keys)) == 5
    worker = opened(logged, "split_worker")
    assert [key for key in keys if any(line.startswith(f"session {key} of device") for line in worker)] == keys
    broker = opened(logged, "split_broker")
    assert all(any(f"session {key}, seq" in line for line in broker) for key in keys)
    assert not any(id_ in line for line in worker + broker for id_ in ("mine", "cached", "many"))
