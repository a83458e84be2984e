"""OpenAI's own packages: `openai` and `openai-agents`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from pydantic import BaseModel

from conftest import KEY, MODEL

HELLO: Any = [{"role": "user", "content": "What is the capital of France?"}]

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


class Capital(BaseModel):
    country: Literal["France", "Spain"]
    large: bool


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=300) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, temperature=0)
    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    pieces = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text


def test_tools(client: openai.OpenAI) -> None:
    for choice in (NAMED, "required"):
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice=choice, max_tokens=100, temperature=0
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        call, *_ = answer.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments).keys() == {"city", "unit"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"}
        more = [*HELLO, answer.choices[0].message, result]
        after = client.chat.completions.create(model=MODEL, messages=more, tools=[WEATHER], max_tokens=5)
        assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_streamed_tools(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice=NAMED, max_tokens=100, temperature=0
    ) as stream:
        for _ in stream:
            pass
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments).keys() == {"city", "unit"}


def test_a_parsed_chat(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Capital, max_tokens=60, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital)


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="What is the capital of France?", max_output_tokens=12)
    assert "Paris" in whole.output_text
    with client.responses.stream(model=MODEL, input="And of Spain?", previous_response_id=whole.id) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


def test_parsed_responses_and_tools(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model=MODEL, input="The capital of France?", text_format=Capital, max_output_tokens=60
    )
    assert isinstance(parsed.output_parsed, Capital)
    tool: Any = {"type": "function", "strict": True, **WEATHER["function"]}
    called = client.responses.create(
        model=MODEL, input="Weather?", tools=[tool], tool_choice={"type": "function", "name": "weather"}
    )
    (call,) = [item for item in called.output if item.type == "function_call"]
    assert json.loads(call.arguments).keys() == {"city", "unit"}


def test_text_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=["The capital of France is", "One, two,"],
        max_tokens=4,
        temperature=0,
        logprobs=1,
        echo=True,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith("The capital of France is")


def test_an_agent_calls_three_tools(url: str) -> None:
    """SmolLM2 calls no tool of its own will, so that the first three turns have to call one."""
    calls: list[str] = []

    @function_tool
    def first(city: Literal["Paris", "Rome"]) -> str:
        calls.append("first")
        return f"{city} is near."

    @function_tool
    def second(number: int) -> str:
        calls.append("second")
        return "Good."

    class Turns(OpenAIResponsesModel):
        async def get_response(self, *args: Any, **options: Any) -> Any:
            settings: ModelSettings = options["model_settings"]
            choice = "required" if len(calls) < 3 else "none"
            options["model_settings"] = settings.resolve(ModelSettings(tool_choice=choice, max_tokens=100))
            return await super().get_response(*args, **options)

    set_tracing_disabled(True)

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=300) as client:
            agent = Agent(
                name="guide",
                instructions="Use the tools.",
                tools=[first, second],
                model=Turns(MODEL, client),
                reset_tool_choice=False,
            )
            return await Runner.run(agent, "Which city is near?", max_turns=6)

    result = asyncio.run(run())
    assert len(calls) >= 3
    assert isinstance(result.final_output, str)
