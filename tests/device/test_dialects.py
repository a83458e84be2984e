"""OpenAI's Responses API and Anthropic's Messages API, as clients send them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx2
import openai
import pydantic
import pytest

import tiny
from serving import KEY, Unsplit, serving

#: Seconds that something may take on a busy machine.
PATIENCE = 300.0

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.save_tokenizer(tiny.save("llama", directory, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with serving(checkpoint) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx2.Client]:
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01", "anthropic-beta": "some-2026-01-01"}
    with httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def responses(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def unsplit(checkpoint: Path) -> Unsplit:
    return Unsplit(checkpoint)


def ask(client: httpx2.Client, path: str = "/messages", **fields: Any) -> httpx2.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields}
    return client.post(path, params={"beta": "true"}, json=body)


def prompt_tokens(usage: dict[str, int]) -> int:
    """All tokens of a prompt, of which Anthropic's format counts those that were cached apart."""
    return usage["input_tokens"] + usage["cache_read_input_tokens"]


def events(client: httpx2.Client, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """The events of a stream, with their names."""
    found = []
    for block in ask(client, stream=True, **fields).text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def test_a_whole_message(client: httpx2.Client, unsplit: Unsplit) -> None:
    expected = unsplit.say("system:Be brief.\nNow.</s>user:Hello</s>assistant:", 8)
    system = [
        {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in ("Be brief.", "Now.")
    ]
    answer = ask(client, system=system, metadata={"user_id": "x"})
    said = answer.json()
    assert said["content"] == [{"type": "text", "text": expected}]
    assert (said["type"], said["role"], said["model"]) == ("message", "assistant", "tiny")
    assert (said["stop_reason"], said["stop_sequence"]) == ("max_tokens", None)
    assert said["usage"]["output_tokens"] == 8
    assert said["id"] == f"msg_{answer.headers['x-request-id']}"
    counted = ask(client, "/messages/count_tokens", system=system).json()
    assert counted == {"input_tokens": prompt_tokens(said["usage"])}
    stopped = ask(client, system=system, stop_sequences=["made up", expected[4:6]]).json()
    assert stopped["content"] == [{"type": "text", "text": expected[: expected.index(expected[4:6])]}]
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", expected[4:6])
    many = ask(client, stop_sequences=["x"] * 1025)
    assert (many.status_code, many.json()["error"]["type"]) == (400, "invalid_request_error")
    assert many.json()["error"]["message"] == "stop_sequences has 1025 entries: at most 1024 are taken"


def test_blocks_and_turns(client: httpx2.Client, unsplit: Unsplit) -> None:
    """Turns of one role are one, and the answer goes on with the assistant's last words."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "user", "content": "C"},
        {"role": "assistant", "content": [{"type": "text", "text": "Good"}]},
    ]
    expected = unsplit.say("user:A\nB\nC</s>assistant:Good", 8)
    assert ask(client, messages=messages).json()["content"] == [{"type": "text", "text": expected}]


def test_a_stream(client: httpx2.Client) -> None:
    whole = ask(client).json()
    found = events(client)
    assert all(name == data["type"] for name, data in found)
    names = [name for name, _ in found]
    deltas = names.count("content_block_delta")
    assert names == [
        *("message_start", "ping", "content_block_start"),
        *["content_block_delta"] * deltas,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    start = found[0][1]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
    text = "".join(data["delta"]["text"] for name, data in found if name == "content_block_delta")
    assert whole["content"] == [{"type": "text", "text": text}]
    assert found[-2][1]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert prompt_tokens(found[-2][1]["usage"]) == prompt_tokens(whole["usage"])
    assert found[-2][1]["usage"]["output_tokens"] == 8


def test_errors_are_anthropic_s(client: httpx2.Client) -> None:
    for refused, status, kind, words in (
        (ask(client, model="another"), 404, "not_found_error", "tiny"),
        (ask(client, temperature=3), 400, "invalid_request_error", "temperature"),
        (ask(client, made_up=1), 400, "invalid_request_error", "made_up"),
        (ask(client, container="c"), 400, "invalid_request_error", "container"),
        (ask(client, tools=[{"type": "bash_20250124", "name": "bash"}]), 400, "invalid_request_error", "tools[0]"),
        (ask(client, tool_choice={"type": "any"}), 400, "invalid_request_error", "tools"),
        (ask(client, messages=[]), 400, "invalid_request_error", "messages"),
        (client.post("/messages", content=b"no JSON"), 400, "invalid_request_error", "JSON"),
        (client.get("/messages"), 405, "invalid_request_error", "GET"),
        (client.post("/messages", json={}, headers={"x-api-key": "x"}), 401, "authentication_error", "key"),
        (client.post("/messages", json={}, headers={"Host": "evil"}), 400, "invalid_request_error", "evil"),
        (client.post("/messages", json={}, headers={"X-Request-Id": "a b"}), 400, "invalid_request_error", "id"),
    ):
        error = refused.json()
        assert (refused.status_code, error["type"], error["error"]["type"]) == (status, "error", kind)
        assert words in error["error"]["message"]
        assert error["request_id"] == refused.headers["x-request-id"]


@pytest.mark.parametrize(
    ("block", "where"),
    [
        ({"type": "image", "source": {"type": "url", "url": "https://x"}}, "messages[0].content.source.url"),
        ({"type": "tool_use", "id": "a", "name": "f", "input": {}}, "messages[0].content[0].type"),
        ({"type": "text", "text": 5}, "messages[0].content[0].text"),
        ({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}, "messages[0].content[0]"),
    ],
)
def test_an_error_names_the_block(client: httpx2.Client, block: dict[str, Any], where: str) -> None:
    refused = ask(client, messages=[{"role": "user", "content": [block]}])
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(where)


# --- OpenAI's Responses API --------------------------------------------------------------------------------


def respond(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(
        model="tiny", **{"input": "Hello", "max_output_tokens": 8, "temperature": 0, **fields}
    )


def test_a_whole_response(responses: openai.OpenAI, unsplit: Unsplit) -> None:
    answer = respond(responses, instructions="Be brief.", metadata={"a": "b"}, user="u")
    assert answer.output_text == unsplit.say("system:Be brief.</s>user:Hello</s>assistant:", 8)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    assert (answer.usage.output_tokens, answer.metadata) == (8, {"a": "b"})
    assert answer.id == f"resp_{answer._request_id}"


def test_a_response_goes_on_from_another_one(responses: openai.OpenAI, unsplit: Unsplit) -> None:
    first = respond(responses)
    second = respond(responses, previous_response_id=first.id)
    prompt = f"user:Hello</s>assistant:{first.output_text}</s>user:Hello</s>assistant:"
    assert second.output_text == unsplit.say(prompt, 8)
    items = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "Hello"}]
    assert respond(responses, input=items, store=False).output_text == second.output_text
    third = respond(responses, previous_response_id=second.id, instructions="Be brief.")
    prompt = f"system:Be brief.</s>{prompt}{second.output_text}</s>user:Hello</s>assistant:"
    assert third.output_text == unsplit.say(prompt, 8)


def test_responses_are_kept_until_they_are_deleted(responses: openai.OpenAI) -> None:
    kept, other = respond(responses), respond(responses, store=False)
    assert responses.responses.retrieve(kept.id).output == kept.output
    (item,) = responses.responses.input_items.list(kept.id).data
    assert item.content[0].text == "Hello"
    responses.responses.delete(kept.id)
    for id_ in (kept.id, other.id):
        with pytest.raises(openai.NotFoundError):
            responses.responses.retrieve(id_)
        with pytest.raises(openai.NotFoundError) as unknown:
            respond(responses, previous_response_id=id_)
        assert unknown.value.code == "previous_response_not_found"


def test_one_request_id_is_two_responses(responses: openai.OpenAI) -> None:
    first = respond(responses, extra_headers={"X-Request-Id": "mine"})
    second = respond(responses, extra_headers={"X-Request-Id": "mine"}, previous_response_id=first.id)
    assert first.id == "resp_mine" != second.id
    assert responses.responses.retrieve(second.id).previous_response_id == first.id


def test_a_streamed_response(responses: openai.OpenAI) -> None:
    whole = respond(responses)
    found = list(respond(responses, stream=True))
    assert [event.sequence_number for event in found] == list(range(len(found)))
    deltas = [event for event in found if event.type == "response.output_text.delta"]
    assert [event.type for event in found] == [
        *("response.created", "response.in_progress", "response.output_item.added"),
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert found[-1].response.output_text == whole.output_text
    assert found[-1].response.usage.total_tokens == whole.usage.total_tokens
    assert responses.responses.retrieve(found[-1].response.id).output_text == whole.output_text
    with responses.responses.stream(model="tiny", input="Hello", max_output_tokens=8, temperature=0) as stream:
        assert "".join(event.delta for event in stream if event.type == "response.output_text.delta")


def test_log_probabilities_of_a_response(responses: openai.OpenAI) -> None:
    answer = respond(responses, top_logprobs=2, include=["message.output_text.logprobs"])
    logprobs = answer.output[0].content[0].logprobs
    assert b"".join(bytes(token.bytes) for token in logprobs).decode() == answer.output_text
    assert [len(token.top_logprobs) for token in logprobs] == [2] * 8


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"temperature": 3}, "temperature"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].image_url"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ],
)
def test_an_error_names_the_field(responses: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        respond(responses, **fields)
    assert refused.value.param == param


# --- what is the same in both ------------------------------------------------------------------------------

#: Arguments of a tool, or a whole answer.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


class Weather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2]


def test_tools_of_a_message(client: httpx2.Client) -> None:
    tools = [{"name": "weather", "description": "The weather", "input_schema": SCHEMA}]
    for kind in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        choice = kind | {"disable_parallel_tool_use": True}
        said = ask(client, tools=tools, tool_choice=choice, max_tokens=200).json()
        (call,) = said["content"]
        assert (said["stop_reason"], call["type"], call["name"]) == ("tool_use", "tool_use", "weather")
        Weather.model_validate(call["input"])
        found = events(client, tools=tools, tool_choice=choice, max_tokens=200)
        arguments = "".join(data["delta"]["partial_json"] for name, data in found if name == "content_block_delta")
        assert json.loads(arguments) == call["input"]
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "Sunny"}
        more = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
        assert ask(client, messages=more, tools=tools).json()["content"]


def test_tools_of_a_response(responses: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
    options: Any = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    options["max_output_tokens"] = 200
    first = respond(responses, **options)
    (call,) = first.output
    assert (first.status, call.type, call.name) == ("completed", "function_call", "weather")
    Weather.model_validate_json(call.arguments)
    found = list(respond(responses, stream=True, **options))
    deltas = [event.delta for event in found if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
    assert respond(responses, previous_response_id=first.id, input=[output], tools=tools).output_text
    patch = [{"type": "custom", "name": "patch", "description": "Takes a patch"}]
    made = respond(responses, tools=patch, tool_choice="required", max_output_tokens=100).output[0]
    assert (made.type, made.name) == ("custom_tool_call", "patch")


def test_answers_of_a_schema(client: httpx2.Client, responses: openai.OpenAI) -> None:
    parsed = responses.responses.parse(model="tiny", input="Hello", text_format=Weather, max_output_tokens=200)
    assert isinstance(parsed.output_parsed, Weather)
    format_ = {"type": "json_schema", "schema": SCHEMA}
    (block,) = ask(client, output_config={"format": format_}, max_tokens=200).json()["content"]
    Weather.model_validate_json(block["text"])
