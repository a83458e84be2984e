"""The HTTP server, as the real `openai` client sees it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import json
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
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

import tiny
from serving import KEY, Unsplit, hanging_up, serving
from split_common.errors import ConfigError, SplitError
from split_device.serving.listener import listening, running_server
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


def test_a_port_is_taken_before_models_are_loaded() -> None:
    """Another user could take it otherwise, with the keys and prompts of clients that try again and again."""
    with listening(0) as listener, socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            thief.bind(listener.getsockname())
        with pytest.raises(ConfigError, match="cannot be used"), listening(listener.getsockname()[1]):
            pass
        # A client that comes early waits, and is answered.
        app, stop = Starlette(), threading.Event()
        with socket.create_connection(listener.getsockname(), PATIENCE) as early:
            early.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with running_server(app, listener, stop):
                assert early.recv(64).startswith(b"HTTP/1.1 404")


def test_an_unforeseen_exception_is_logged_without_its_message(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_request: Request) -> Response:
        raise RuntimeError("what the user asked")

    app = Starlette(routes=[Route("/", fail)])
    with listening(0) as listener, running_server(app, listener, threading.Event()):
        port = listener.getsockname()[1]
        assert httpx2.get(f"http://127.0.0.1:{port}/", timeout=PATIENCE).status_code == 500
    logged = capfd.readouterr().err
    assert "RuntimeError" in logged
    assert "asked" not in logged


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
    text = client.completions.create(
        model="tiny", prompt="Once", temperature=0, extra_headers={"X-Request-Id": "mine"}
    )
    assert text.choices[0].text == unsplit.say("Once", 16)
    assert (text.id, text._request_id) == ("cmpl-mine", "mine")
    assert answer.id == f"chatcmpl-{answer._request_id}"


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
    deltas = [choice.delta.to_dict() for chunk in chunks for choice in chunk.choices if choice.index == 1]
    assert deltas[0]["role"] == "assistant"
    assert {"content": ""} not in deltas
    assert chunks[-1].usage.completion_tokens == 16
    text = client.completions.create(model="tiny", prompt="Once", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in text) == unsplit.say("Once", 16)


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_load_generator_is_answered(fleet: tuple[str, Any], kind: str) -> None:
    """It asks for so many tokens, whatever the model wants to say, and counts them as they come."""
    body: dict[str, Any] = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "stop": None,
        "ignore_eos": True,
    }
    body |= (
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            "max_completion_tokens": 40,
        }
        if kind == "chat"
        else {"prompt": "Hello", "max_tokens": 40}
    )
    path = "chat/completions" if kind == "chat" else "completions"
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx2.post(f"{fleet[0]}/{path}", json=body, headers=headers, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    *events, end = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert end == "data: [DONE]"
    usages = [json.loads(event.removeprefix("data: "))["usage"] for event in events]
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] == 40
    assert {usage["prompt_tokens"] for usage in usages} == {usages[-1]["prompt_tokens"]}


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
    answer = ask(client, logprobs=True).choices[0]
    assert b"".join(bytes(token.bytes) for token in answer.logprobs.content) == answer.message.content.encode()
    text = client.completions.create(model="tiny", prompt="Once", temperature=0, logprobs=2, max_tokens=4)
    logprobs = text.choices[0].logprobs
    assert "".join(logprobs.tokens) == text.choices[0].text
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 4


def test_errors_are_openai_s(client: openai.OpenAI, fleet: tuple[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, functions=[{"name": "f"}])
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "functions")
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


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("GET", "/models", {"Host": "evil.example"}, b"", 400),
        ("GET", "/models", {"Host": ""}, b"", 400),
        ("GET", "/made-up", {}, b"", 404),
        ("OPTIONS", "/chat/completions", {}, b"", 405),
        ("HEAD", "/chat/completions", {}, b"", 405),
        ("POST", "/completions", {}, b"\xff", 400),
        ("POST", "/completions", {}, "{}".encode("utf-16"), 400),
        ("POST", "/completions", {}, b'{"prompt": "\\ud83d"}', 400),
        ("POST", "/completions", {"Content-Encoding": "gzip"}, b"x", 415),
        ("POST", "/completions", {"Content-Type": "application/json; charset=latin-1"}, b"{}", 415),
        ("POST", "/completions", {"Content-Length": "5000000"}, b"", 413),
        ("GET", "/models", {"Authorization": "Basic YTpi"}, b"", 401),
    ],
)
def test_every_refusal_is_an_error_object(
    fleet: tuple[str, Any], method: str, path: str, headers: dict[str, str], content: bytes, status: int
) -> None:
    split = urlsplit(fleet[0])
    assert split.hostname is not None
    connection = http.client.HTTPConnection(split.hostname, split.port)
    try:
        connection.putrequest(method, f"/v1{path}", skip_host=True)
        usual = {"Host": split.netloc, "Authorization": f"Bearer {KEY}", "Content-Length": str(len(content))}
        for name, value in {**usual, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(content)
        response = connection.getresponse()
        assert response.status == status
        assert response.headers["Content-Type"] == "application/json"
        assert (response.headers["Allow"] is not None) == (status == 405)
        assert (response.headers["WWW-Authenticate"] == "Bearer") == (status == 401)
        if method != "HEAD":
            error = json.loads(response.read())["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
    finally:
        connection.close()


@pytest.mark.parametrize("host", ["LOCALHOST", "localhost.", "127.0.0.1:1", "[::1]:8080", "Gateway.Example:80"])
def test_names_of_the_host(fleet: tuple[str, Any], host: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Host": host}
    assert httpx2.get(f"{fleet[0]}/models", headers=headers).status_code == 200


def test_a_refused_host_is_told_the_allowed_ones(fleet: tuple[str, Any]) -> None:
    refused = httpx2.get(f"{fleet[0]}/models", headers={"Host": "host.docker.internal:8080"})
    error = refused.json()["error"]
    assert error["code"] == "invalid_host"
    for words in ("'host.docker.internal:8080'", "localhost", "gateway.example", "--allowed-host"):
        assert words in error["message"]


def test_the_scheme_of_a_key_has_no_case(fleet: tuple[str, Any]) -> None:
    for given, status in (("bearer", 200), ("BEARER ", 200), ("Bearer  ", 200), ("Token", 401)):
        headers = {"Authorization": f"{given} {KEY}"}
        assert httpx2.get(f"{fleet[0]}/models", headers=headers).status_code == status


def test_a_name_that_no_host_has_is_refused(run: Any, checkpoint: Path) -> None:
    for name in ("http://localhost", "localhost:80", "", "*"):
        refused = run("serve", "--model", checkpoint, "--port", 0, "--allowed-host", name)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "invalid host name" in refused.err


def test_an_answer_goes_back_into_the_conversation(client: openai.OpenAI, unsplit: Unsplit) -> None:
    said = ask(client).choices[0].message
    expected = unsplit.say(f"user:Hello</s>assistant:{said.content}</s>user:Hello</s>assistant:", 8)
    for message in (said, said.model_dump(), said.model_dump(exclude_unset=True)):
        assert ask(client, messages=[*HELLO, message, *HELLO]).choices[0].message.content == expected


def test_an_answer_is_continued(client: openai.OpenAI, unsplit: Unsplit) -> None:
    first = ask(client, max_tokens=5).choices[0].message.content
    begun: Any = [*HELLO, {"role": "assistant", "content": first}]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    rest = ask(client, messages=begun, max_tokens=3, extra_body=going_on)
    assert first + rest.choices[0].message.content == unsplit.say("user:Hello</s>assistant:", 8)
    unsaid = ask(client, messages=begun, max_tokens=3)
    assert unsaid.choices[0].message.content == rest.choices[0].message.content
    anew = unsplit.say(f"user:Hello</s>assistant:{first}</s>assistant:", 3)
    for more in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        assert ask(client, messages=begun, max_tokens=3, extra_body=more).choices[0].message.content == anew
    for body, param in (
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, extra_body=body)
        assert refused.value.param == param


def test_a_long_prompt_is_encoded_once_and_holds_nobody_up(client: openai.OpenAI, fleet: tuple[str, Any]) -> None:
    """Else 128 choices of it would take minutes, in which the server answered nobody."""
    with hanging_up(f"{fleet[0]}/completions", {"model": "tiny", "prompt": "x " * 1_900_000, "n": 128}, KEY):
        assert httpx2.get(fleet[0].replace("/v1", "/health"), timeout=PATIENCE).status_code == 200
        with pytest.raises(openai.BadRequestError, match="leave no room"):
            client.completions.create(model="tiny", prompt="x" * POSITIONS)


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


@contextlib.contextmanager
def bounded_server(**limits: Any) -> Iterator[Any]:
    """The address of a server that answers after five times its shortest `head_timeout`."""

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)
        await Response("done")(scope, receive, send)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        app = Starlette(routes=[Mount("/", slow)])
        with running_server(app, listener, threading.Event(), **limits):
            yield listener.getsockname()


REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_connections_without_a_request_are_closed() -> None:
    with (
        bounded_server(head_timeout=0.1, most=9) as address,
        socket.create_connection(address, PATIENCE) as silent,
        socket.create_connection(address, PATIENCE) as dripping,
    ):
        dripping.sendall(REQUEST[:9])
        assert ends(silent) == ends(dripping) == b""
        # A request that is under way has its time. On a busy machine it may be sent too late.
        for _ in range(100):
            with socket.create_connection(address, PATIENCE) as asking, contextlib.suppress(OSError):
                asking.sendall(REQUEST)
                if ends(asking).endswith(b"done"):
                    break
        else:
            pytest.fail("no request is answered")


def test_connections_that_are_too_many_are_closed() -> None:
    with (
        bounded_server(head_timeout=2 * PATIENCE, most=1) as address,
        socket.create_connection(address, PATIENCE) as first,
    ):
        first.sendall(REQUEST)
        assert first.recv(1)
        with socket.create_connection(address, PATIENCE) as second:
            assert ends(second) == b""


def ends(connection: socket.socket) -> bytes:
    """All that a connection sends until it is closed."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


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
    refused = run("serve", "--model", checkpoint, "--reuse", "2")
    assert refused.code == 2
    assert "--reuse needs --image-model" in refused.err


def test_a_port_that_is_taken(run: Any, checkpoint: Path, fleet: tuple[str, Any]) -> None:
    port = urlsplit(fleet[0]).port
    refused = run("serve", "--model", checkpoint, "--port", port)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"port {port} cannot be used: Address already in use" in refused.err


def sessions(worker: Any) -> int:
    """How many there are that a request uses."""
    facts = worker.facts()
    return int(facts["sessions"] - facts["kept"])


def tokens(worker: Any) -> int:
    return int(worker._compute.counters["tokens"])
