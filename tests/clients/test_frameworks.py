"""Frameworks for agents: LangChain, Pydantic AI, LiteLLM, Instructor."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import litellm
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.output import NativeOutput
from pydantic_ai.providers.openai import OpenAIProvider

from conftest import KEY, MODEL


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    big: bool


def weather(city: Literal["Paris", "Rome"]) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@pytest.fixture
def chat(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key=KEY, model=MODEL, max_tokens=60, temperature=0, max_retries=0)  # type: ignore[arg-type,call-arg]


def test_langchain(chat: ChatOpenAI) -> None:
    assert "Paris" in str(chat.invoke("What is the capital of France?").content)
    assert len(chat.batch(["Hello", "Good morning"])) == 2
    assert "".join(str(piece.content) for piece in chat.stream("Hello"))
    (call,) = chat.bind_tools([weather], tool_choice="weather").invoke("Weather?").tool_calls
    assert call["name"] == "weather"
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(City, method=method).invoke("A city?"), City)


def test_langchain_s_text_completions(url: str) -> None:
    texts = OpenAI(base_url=url, api_key=KEY, model=MODEL, max_tokens=4, temperature=0, max_retries=0)  # type: ignore[arg-type,call-arg]
    assert len(texts.batch(["One, two,", "The capital of France is"])) == 2


def test_pydantic_ai(url: str) -> None:
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEY))
    settings: Any = {"max_tokens": 60, "temperature": 0}
    assert Agent(model, model_settings=settings).run_sync("Hello").output
    for output in (City, NativeOutput(City)):
        agent: Any = Agent(model, output_type=output, model_settings=settings)
        assert isinstance(agent.run_sync("A city?").output, City)


def test_litellm(url: str) -> None:
    common: Any = {"api_base": url, "api_key": KEY, "temperature": 0}
    ask: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer: Any = litellm.completion(f"openai/{MODEL}", ask, max_tokens=12, **common)
    assert "Paris" in answer.choices[0].message.content
    pieces: Any = litellm.completion(f"openai/{MODEL}", ask, max_tokens=12, stream=True, **common)
    assert "Paris" in "".join(piece.choices[0].delta.content or "" for piece in pieces)
    parsed: Any = litellm.completion(f"openai/{MODEL}", ask, max_tokens=60, response_format=City, **common)
    assert City.model_validate_json(parsed.choices[0].message.content)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA])
def test_instructor(url: str, mode: instructor.Mode) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key=KEY, max_retries=0), mode=mode)
    # Where nothing but JSON is promised, so small a model needs an example to fit the schema by itself.
    example = ' Answer like {"name": "Rome", "big": true}.' if mode is instructor.Mode.JSON else ""
    ask: Any = [{"role": "user", "content": f"A big city: name Paris or Rome.{example}"}]
    city = client.chat.completions.create(
        model=MODEL, messages=ask, response_model=City, max_tokens=300, temperature=0, max_retries=0
    )
    assert isinstance(city, City)
