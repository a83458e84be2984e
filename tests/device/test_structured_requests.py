"""Structured outputs over HTTP: what fields are parsed to, real answers, and errors that name the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from msgspec import UNSET

import tiny
from serving import KEY, serving
from split_device.generation.structured import StructuredOutputs
from split_device.jobs.job import ModelChoice
from split_device.serving.fields import ApiError
from split_device.serving.openai.requests import parse

HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}


def structured(kind: Any = "chat", **fields: Any) -> Any:
    body = {"model": "m", **({"messages": HELLO} if kind == "chat" else {"prompt": "Hello"}), **fields}
    return parse(kind, body, ModelChoice(name="m")).tasks[0].structured


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_fields_become_constraints(kind: str) -> None:
    assert structured(kind) is UNSET
    assert structured(kind, response_format={"type": "text"}, structured_outputs=None) is UNSET
    assert structured(kind, response_format=FORMAT) == StructuredOutputs(json=SCHEMA)
    assert structured(kind, response_format={"type": "json_object"}) == StructuredOutputs(json_object=True)
    for field, value in {"json": SCHEMA, "regex": "a+", "choice": ["a", "b"], "grammar": 'start: "a"'}.items():
        wanted = StructuredOutputs(**{field: tuple(value) if field == "choice" else value})
        assert structured(kind, structured_outputs={field: value}) == wanted
    assert structured(kind, structured_outputs={"json": json.dumps(SCHEMA)}) == StructuredOutputs(json=SCHEMA)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs"),
    ],
)
def test_what_is_wrong_names_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as error:
        structured(**fields)
    assert (error.value.status, error.value.param) == (400, param)


def test_unknown_constraints_are_named() -> None:
    with pytest.raises(ApiError, match=r"structured_outputs\.structural_tag: unknown field"):
        structured(structured_outputs={"structural_tag": "{}"})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    directory: Path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save_tokenizer(tiny.save("llama", directory, max_position_embeddings=1024))
    with (
        serving(directory) as (address, _),
        openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_answers_fit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, response_format=FORMAT, n=2, seed=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    text = client.completions.create(
        model="tiny", prompt="Hello", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, logprobs=1
    )
    assert text.choices[0].text in ("yes", "no")
    assert text.choices[0].finish_reason == "stop"


def test_a_stream_is_the_whole(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "response_format": FORMAT, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
    ]
    assert "".join(pieces) == whole


def test_what_cannot_be_enforced_is_refused_before_it_begins(client: openai.OpenAI) -> None:
    schema = {"type": "array", "uniqueItems": True}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="uniqueItems cannot be enforced") as error:
            client.chat.completions.create(
                model="tiny", messages=HELLO, stream=stream, extra_body={"structured_outputs": {"json": schema}}
            )
        assert error.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="takes longer"):
        client.completions.create(
            model="tiny",
            prompt="a",
            extra_body={"structured_outputs": {"json": {"type": "integer", "multipleOf": 9999991}}},
        )
