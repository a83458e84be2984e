"""The HTTP server, as the real `openai` client sees it."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
import torch
from starlette.applications import Starlette

import tiny
from serving import KEY, Unsplit, hanging_up, serving
from split_common.errors import SplitError
from split_device.openai.listener import running_server
from wiretap import wait_until

#: Seconds that something may take on a busy machine.
PATIENCE = 300.0

POSITIONS = 4096

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # So many that nobody generates them all while a test waits for something else.
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.save_tokenizer(tiny.save("llama", directory, max_position_embeddings=POSITIONS))


@pytest.fixture(scope="module")
def fleet(checkpoint: Path) -> Iterator[tuple[str, Any]]:
    with serving(checkpoint) as found:
        yield found


@pytest.fixture(scope="module")
def client(fleet: tuple[str, Any]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=fleet[0], api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def unsplit(checkpoint: Path) -> Unsplit:
    return Unsplit(checkpoint)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", **{"messages": HELLO, "max_tokens": 8, "temperature": 0, **options}
    )


def test_whole_answers(client: openai.OpenAI, unsplit: Unsplit) -> None:
    expected = unsplit.say("user:Hello</s>assistant:", 8)
    answer = ask(client)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 21,
        "completion_tokens": 8,
        "total_tokens": 29,
    }
    stopped = ask(client, stop=[expected[4:6]])
    assert stopped.choices[0].message.content == expected[: expected.index(expected[4:6])]
    assert stopped.choices[0].finish_reason == "stop"
    both = ask(client, temperature=1, seed=3, n=2)
    assert [choice.message.content for choice in both.choices] == [
        unsplit.say("user:Hello</s>assistant:", 8, seed) for seed in (3, 4)
    ]
    text = client.completions.create(model="tiny", prompt="Once", temperature=0)
    assert text.choices[0].text == unsplit.say("Once", 16)


def test_streams(client: openai.OpenAI, unsplit: Unsplit) -> None:
    chunks = list(ask(client, stream=True, n=2, stream_options={"include_usage": True}))
    texts = {0: "", 1: ""}
    reasons = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert set(texts.values()) == {unsplit.say("user:Hello</s>assistant:", 8)}
    assert reasons == {0: "length", 1: "length"}
    assert chunks[-1].usage.completion_tokens == 16
    text = client.completions.create(model="tiny", prompt="Once", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in text) == unsplit.say("Once", 16)


def test_logprobs_are_those_of_the_unsplit_model(client: openai.OpenAI, unsplit: Unsplit) -> None:
    ids = unsplit.tokenizer("user:Hello</s>assistant:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = torch.log_softmax(unsplit.model(ids).logits[0, -1], -1)
    told = ask(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(told) == 8
    assert told[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert [top.logprob for top in told[0].top_logprobs] == pytest.approx(
        expected.topk(3).values.tolist(), abs=1e-4
    )
    text = client.completions.create(model="tiny", prompt="Once", temperature=0, logprobs=2, max_tokens=4)
    logprobs = text.choices[0].logprobs
    assert "".join(logprobs.tokens) == text.choices[0].text
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 4


def test_errors_are_openai_s(client: openai.OpenAI, fleet: tuple[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, messages=[{"role": "user", "content": "x" * POSITIONS}])
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="another", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="another"))
    url = fleet[0]
    headers = {"Authorization": f"Bearer {KEY}"}
    for refused, status in (
        (httpx2.post(f"{url}/chat/completions", content=b"no JSON", headers=headers), 400),
        (httpx2.post(f"{url}/chat/completions", content=b"[" * 5_000_000, headers=headers), 413),
        (httpx2.post(f"{url}/embeddings", json={}, headers=headers), 404),
        (httpx2.get(f"{url}/chat/completions", headers=headers), 405),
    ):
        assert refused.status_code == status
        assert refused.json()["error"]["type"] == "invalid_request_error"
    assert httpx2.get(f"{url}/models", headers={**headers, "Host": "evil.example"}).status_code == 400


def test_web_pages_of_other_origins_are_refused(fleet: tuple[str, Any]) -> None:
    """A browser sends what they tell it to, by this machine's name."""
    url = f"{fleet[0]}/completions"
    own = fleet[0].removesuffix("/v1")
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 1}
    for origin, status in ((own, 200), ("https://evil.example", 403), ("http://127.0.0.1:1", 403), ("null", 403)):
        headers = {"Authorization": f"Bearer {KEY}", "Origin": origin}
        assert httpx2.post(url, json=body, headers=headers).status_code == status


@pytest.mark.parametrize("key", ["", "a key", "schlüssel"])
def test_a_key_that_no_client_can_send_is_refused(key: str, run: Any, checkpoint: Path) -> None:
    refused = run("serve", "--model", checkpoint, "--port", 0, "--api-key", key)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "API key" in refused.err


def test_models_and_health(client: openai.OpenAI, fleet: tuple[str, Any]) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lambda-split"
    assert httpx2.get(fleet[0].replace("/v1", "/health")).json() == {"status": "ok"}


def test_many_streams_at_once(fleet: tuple[str, Any], unsplit: Unsplit) -> None:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=fleet[0], api_key=KEY, max_retries=0) as client:

            async def one(text: str) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=text, temperature=0, max_tokens=8, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(one(f"Number {index}") for index in range(32))))

    assert asyncio.run(all_of_them()) == [unsplit.say(f"Number {index}", 8) for index in range(32)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_session(fleet: tuple[str, Any], stream: bool) -> None:
    url, worker = fleet
    wait_until(lambda: not sessions(worker), PATIENCE)
    body = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 4000, "stream": stream, "n": 4}
    headers = {"Authorization": f"Bearer {KEY}"}
    before = tokens(worker)
    if stream:
        with httpx2.stream("POST", f"{url}/completions", json=body, headers=headers, timeout=PATIENCE) as response:
            next(response.iter_lines())
            assert sessions(worker)
    else:
        with hanging_up(f"{url}/completions", body, KEY):
            wait_until(lambda: tokens(worker) > before, PATIENCE)
    wait_until(lambda: not sessions(worker), PATIENCE)
    # All four answers would have been far more.
    assert tokens(worker) - before < 2 * 4000


def test_a_server_that_cannot_listen_says_so() -> None:
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("127.0.0.1", first.getsockname()[1] if each is second else 0))
        first.listen()
        with (
            pytest.raises(SplitError, match="in use"),
            running_server(Starlette(), second, threading.Event()),
        ):
            pytest.fail("it says that it listens")


def test_a_server_that_ends_by_itself_is_noticed() -> None:
    stop = threading.Event()

    def break_its_loop() -> None:
        thread = next(each for each in threading.enumerate() if each.name == "http")
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(OSError))
        assert stop.wait(PATIENCE)
        thread.join()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with pytest.raises(SplitError, match="has ended"), running_server(Starlette(), listener, stop):
            break_its_loop()


def test_options_of_images_need_an_image_model(run: Any, checkpoint: Path) -> None:
    refused = run("serve", "--model", checkpoint, "--codec", "int8")
    assert refused.code == 2
    assert "--codec needs --image-model" in refused.err


def test_a_port_that_is_taken(run: Any, checkpoint: Path, fleet: tuple[str, Any]) -> None:
    port = urlsplit(fleet[0]).port
    refused = run("serve", "--model", checkpoint, "--port", port)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"port {port} cannot be used: Address already in use" in refused.err


def sessions(worker: Any) -> int:
    return len(worker._sessions)


def tokens(worker: Any) -> int:
    return int(worker._compute.counters["tokens"])
