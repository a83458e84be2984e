"""Requests in OpenAI's formats: what clients send back, what has no effect, and how errors name their place."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage

from split_device.jobs.job import Message, ModelChoice
from split_device.serving.fields import ApiError
from split_device.serving.openai.chat import FIELDS as CHAT_FIELDS
from split_device.serving.openai.requests import parse
from split_device.serving.openai.text import FIELDS as TEXT_FIELDS

MODEL = ModelChoice(name="m")
HELLO = {"role": "user", "content": "Hello"}


def chat(messages: Any, **fields: Any) -> Any:
    return parse("chat", {"model": "m", "messages": messages, **fields}, MODEL)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None},
        {"refusal": "", "annotations": [], "tool_calls": [], "name": "Ada"},
        {"reasoning_content": None, "some_server_s_own": None},
    ],
)
def test_an_answer_is_taken_back(fields: dict[str, Any]) -> None:
    said = {"role": "assistant", "content": "Hi"} | fields
    assert chat([HELLO, said, HELLO]).tasks == chat([HELLO, {"role": "assistant", "content": "Hi"}, HELLO]).tasks


def test_the_client_s_own_message_is_taken_back() -> None:
    said = ChatCompletionMessage(role="assistant", content="Hi")
    for dumped in (said.model_dump(), said.model_dump(exclude_unset=True)):
        assert chat([HELLO, dumped]).tasks[0].prompt == (Message("user", "Hello"), Message("assistant", "Hi"))


def test_parts_of_a_content() -> None:
    parts = [{"type": "text", "text": "Hel", "annotations": None}, {"type": "text", "text": "lo"}]
    assert chat([{"role": "developer", "content": parts}]).tasks[0].prompt == (Message("system", "Hello"),)


def test_nulls_are_as_good_as_absent_fields() -> None:
    nulls = dict.fromkeys(("stop", "n", "seed", "logprobs", "top_logprobs", "tools", "made_up"))
    assert chat([HELLO], **nulls, stream_options={"include_usage": None}) == chat([HELLO])


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ("Hello", "messages", None),
        ([], "messages", None),
        ([HELLO, "Hello"], "messages[1]", None),
        ([{"role": "user"}], "messages[0].content", None),
        ([{"role": "assistant", "content": None}], "messages[0].content", None),
        ([HELLO, {"role": "user", "content": 5}], "messages[1].content", None),
        ([HELLO, {"role": "robot", "content": "x"}], "messages[1].role", None),
        ([HELLO, {"role": "tool", "content": "x"}], "messages[1].tool_call_id", None),
        (
            [HELLO, {"role": "assistant", "tool_calls": [{"id": "x", "function": {}}]}],
            "messages[1].tool_calls[0].function.name",
            None,
        ),
        ([{**HELLO, "tool_calls": [{}]}], "messages[0].tool_calls", "unsupported_parameter"),
        ([{**HELLO, "refusal": "No."}], "messages[0].refusal", "unsupported_parameter"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].image_url", None),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text", None),
    ],
)
def test_an_error_names_the_message(messages: Any, param: str, code: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        chat(messages)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert str(refused.value).startswith(param)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ApiError, match=r"^colour: unknown field$"):
        chat([HELLO], colour="red")
    with pytest.raises(ApiError, match=r"^messages\[1\]\.colour: unknown field$"):
        chat([HELLO, {**HELLO, "colour": "red"}])


@pytest.mark.parametrize(
    ("kind", "body", "fields"),
    [
        ("chat", {"model": "m", "messages": [HELLO]}, CHAT_FIELDS),
        ("text", {"model": "m", "prompt": "Hello"}, TEXT_FIELDS),
    ],
)
def test_each_field_is_treated_as_it_says(kind: Any, body: dict[str, Any], fields: dict[str, str]) -> None:
    plain = parse(kind, body, MODEL)
    for name, done in fields.items():
        odd = {**body, name: [{}]}
        if done == "ignored":
            assert parse(kind, odd, MODEL) == plain
            continue
        with pytest.raises(ApiError) as caught:
            parse(kind, odd, MODEL)
        assert (caught.value.code == "unsupported_parameter") == (done == "refused"), name
        assert "unknown field" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": None}, "messages", None),
        ({"stop": [1]}, "stop[0]", None),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", None),
    ],
)
def test_an_error_names_the_field(fields: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        parse("chat", {"model": "m", "messages": [HELLO], **fields}, MODEL)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert str(refused.value).startswith(param)
