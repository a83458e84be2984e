"""Bodies that no client should send: each is answered, or refused by an error object of its dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import pytest

import tiny
from serving import KEY, serving
from split_device.serving.anthropic import requests as anthropic
from split_device.serving.openai.responses import requests as responses

#: Seconds that something may take on a busy machine.
PATIENCE = 300.0

HELLO = [{"role": "user", "content": "Hello"}]

#: A body that is answered, by its path.
BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": {"messages": HELLO, "max_tokens": 1},
    "/completions": {"prompt": "Hello", "max_tokens": 1},
    "/responses": {"input": "Hello", "max_output_tokens": 1},
    "/messages": {"messages": HELLO, "max_tokens": 1},
    "/messages/count_tokens": {"messages": HELLO},
}

FIRST, *OTHERS = BODIES

#: Those whose fields are read as another one's.
ALIKE = ("/completions", "/messages/count_tokens")

#: Fields of chats and texts that have a meaning.
CHAT = """
model messages prompt max_tokens max_completion_tokens temperature top_p top_k min_p seed stop n best_of stream
stream_options logprobs top_logprobs logit_bias frequency_penalty presence_penalty repetition_penalty min_tokens
stop_token_ids ignore_eos bad_words speculate echo suffix prompt_logprobs response_format structured_outputs tools
tool_choice parallel_tool_calls chat_template_kwargs reasoning_effort continue_final_message add_generation_prompt
user metadata store images modalities audio functions function_call
"""

FIELDS = {
    "/chat/completions": CHAT.split(),
    "/completions": CHAT.split(),
    "/responses": [*responses.FIELDS],
    "/messages": [*anthropic.FIELDS],
    "/messages/count_tokens": [*anthropic.FIELDS],
}

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

#: As JSON, since some of it is nothing that a Python program sends.
VALUES = ["1e400", "[null]", '"\\ud800"']
MORE = [
    *("null", "-1", str(2**70), f"[{2**70}]", "[]", '{"": null}', '{"type": 1}', json.dumps(DEEP)),
    *('[{"role": "assistant", "content": null}]', '[{"role": "tool", "content": "x"}]', '[{"type": "text"}]'),
    *('[{"role": "user", "content": []}]', '[{"type": ["function"]}]'),
    '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]',
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny"))
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with serving(checkpoint) as (url, _), httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
        yield client


def check(answer: httpx2.Response, path: str, what: object) -> None:
    """Raises AssertionError unless it is an answer, or an error object that says something."""
    assert answer.status_code < 500, (what, answer.text)
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert "Traceback" not in answer.text
        return
    said = answer.json()
    if answer.status_code >= 400:
        assert said["error"]["message"], what
        assert said["error"]["type"], what
        assert said.get("type") == ("error" if path.startswith("/messages") else None), what


def odd(client: httpx2.Client, path: str, values: list[str], names: Sequence[str] = ()) -> None:
    fields = json.dumps({"model": "tiny", "temperature": 0})[1:-1]
    for name in names or FIELDS[path]:
        body = BODIES[path]
        rest = json.dumps({key: value for key, value in body.items() if key != name})[1:-1]
        for value in values:
            # The last of two fields of one name counts.
            text = "{" + ", ".join(filter(None, (fields, rest, f'"{name}": {value}'))) + "}"
            check(client.post(path, content=text), path, (name, value[:80]))


@pytest.mark.parametrize("path", [FIRST, *(pytest.param(path, marks=pytest.mark.long) for path in OTHERS)])
def test_a_field_of_another_kind(client: httpx2.Client, path: str) -> None:
    odd(client, path, VALUES)
    assert client.post(path, json={"model": "tiny", **BODIES[path]}).status_code == 200


#: Numbers at the edge, and fields that take some. What parsing does with them is in `test_number_sweep.py`.
EDGES = ["0", "5e-324", "1e308", str(2**53 + 1), str(2**63), "NaN", "true", '"1"']
NUMBERS = {
    "/chat/completions": ["top_k", "min_p", "repetition_penalty", "frequency_penalty", "min_tokens", "logprobs"],
    "/completions": ["n", "best_of", "logprobs", "prompt_logprobs"],
    "/responses": ["temperature", "top_p", "top_k", "top_logprobs", "seed"],
    "/messages": ["temperature", "top_p", "top_k"],
}


@pytest.mark.parametrize(
    "path", [path if path == FIRST else pytest.param(path, marks=pytest.mark.long) for path in NUMBERS]
)
def test_numbers_at_the_edge(client: httpx2.Client, path: str) -> None:
    odd(client, path, EDGES, NUMBERS[path])


def test_what_is_empty_or_a_list(client: httpx2.Client) -> None:
    nothing = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": []}]}
    assert client.post("/messages", json=nothing).json()["error"]["message"].startswith("messages: expected")
    tools = {"model": "tiny", "input": "x", "tools": [{"type": ["function"]}]}
    assert client.post("/responses", json=tools).status_code == 400
    huge = {"model": "tiny", "prompt": [2**70], "max_tokens": 1}
    assert f"token {2**70} is not among" in client.post("/completions", json=huge).json()["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.nightly if path in ALIKE else pytest.mark.long) for path in BODIES],
)
def test_more_values_of_a_field(client: httpx2.Client, path: str) -> None:
    odd(client, path, MORE)
    assert client.post(path, json={"model": "tiny", **BODIES[path]}).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_body_that_is_not_one(client: httpx2.Client, path: str) -> None:
    nested = b"[" * 100_000 + b"]" * 100_000
    for body in (
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xff\xfe{",
        b"NaN",
        b"{'a': 1}",
        nested,
        b'{"model": ' + nested + b"}",
    ):
        answer = client.post(path, content=body)
        assert answer.status_code == 400, (body[:20], answer.text)
        check(answer, path, body[:20])
