"""Anthropic's own package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from conftest import KEY, MODEL

HELLO: Any = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
}


@pytest.fixture
def client(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key=KEY, max_retries=0, timeout=300) as client:
        yield client


def test_messages(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model=MODEL, max_tokens=12, messages=HELLO)
    text = "".join(block.text for block in message.content if block.type == "text")
    assert "Paris" in text
    with client.messages.stream(model=MODEL, max_tokens=12, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().stop_reason in ("end_turn", "max_tokens")
    count = client.messages.count_tokens(model=MODEL, messages=HELLO)
    assert count.input_tokens == message.usage.input_tokens


def test_tools(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model=MODEL,
        max_tokens=100,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather"},
    )
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (message.stop_reason, call.name) == ("tool_use", "weather")
    assert call.input in ({"city": "Paris"}, {"city": "Rome"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees"}
    more: Any = [*HELLO, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(model=MODEL, max_tokens=5, messages=more, tools=[WEATHER])
    assert after.content


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=5, messages=HELLO)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="wrong").messages.create(model=MODEL, max_tokens=5, messages=HELLO)
