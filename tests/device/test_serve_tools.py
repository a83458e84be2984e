"""Tools and thinking, as real clients see them: over HTTP and in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import LogitsProcessorList

import tiny
from fleet import serving_here
from grammar_walk import ConstraintProcessor
from serving import KEY, PARAMETERS, QUESTION, WEATHER, Unsplit
from split_common.system.process import running_command
from split_device.generation.answers import answer_format
from split_device.generation.call_grammar import call_constraint
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.constraint import Grammars
from split_device.generation.tokenizing import encode_chat, end_tokens
from split_device.generation.tools import NamedTool, Tool, ToolUse

POSITIONS = 4096

CLOCK = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.save_tokenizer(tiny.save("llama", directory, max_position_embeddings=POSITIONS))


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    with serving_here(checkpoint) as address:
        yield address


@pytest.fixture(scope="module")
def client(checkpoint: Path, address: str) -> Iterator[openai.OpenAI]:
    command = ["serve", "--port", "0", "--model", str(checkpoint), "--broker", address]
    with (
        running_command(command, env={"LAMBDA_SPLIT_API_KEY": KEY}) as (_, facts),
        openai.OpenAI(base_url=facts["url"], api_key=KEY, max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    given = {"messages": [QUESTION], "max_tokens": 150, "temperature": 0, "tools": [WEATHER, CLOCK], **options}
    return client.chat.completions.create(model="tiny", **given)


def unsplit_answer(checkpoint: Path, tool_use: ToolUse, tokens: int) -> str:
    """What transformers' own `generate` writes under the same constraint."""
    unsplit = Unsplit(checkpoint)
    tokenizer = unsplit.tokenizer
    ends = end_tokens(unsplit.model, tokenizer)
    constraint = call_constraint(tokenizer, answer_format(tokenizer, ChatTemplate(), tool_use))
    assert constraint is not None
    grammars = Grammars(tokenizer, unsplit.model.config.vocab_size, ends)
    ids = encode_chat(tokenizer, [QUESTION], tool_use=tool_use)
    processor = ConstraintProcessor(grammars.constraint(constraint), ids.shape[1])
    output = unsplit.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        logits_processor=LogitsProcessorList([processor]),
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_named_tool_is_called(client: openai.OpenAI, checkpoint: Path) -> None:
    """With the arguments that the unsplit model gives."""
    choice = ask(client, tool_choice=NAMED).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.type, call.function.name) == ("function", "get_weather")
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Oslo", "Rome")
    assert 1 <= arguments["days"] <= 9
    tools = (Tool(name="get_weather", parameters=PARAMETERS), Tool(name="now"))
    text = unsplit_answer(checkpoint, ToolUse(tools=tools, choice=NamedTool("get_weather")), 150)
    assert text == f'<tool_call>\n{{"name": "get_weather", "arguments": {call.function.arguments}}}\n</tool_call>'


def test_a_stream_has_what_a_whole_answer_has(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(client, **options).choices[0]
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True, **options)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
    (call,) = whole.message.tool_calls
    assert whole.finish_reason == chunks[-1].finish_reason == "tool_calls"
    assert (deltas[0].index, deltas[0].type, deltas[0].function.name) == (0, "function", call.function.name)
    assert deltas[0].id.startswith("call_")
    assert all(delta.id is None and delta.index == 0 for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert not any(chunk.delta.content for chunk in chunks)
    assert chunks[0].delta.role == "assistant"


def test_several_calls_and_choices(client: openai.OpenAI) -> None:
    """With log probabilities of all tokens, those of calls included."""
    answer = ask(
        client, tool_choice="required", n=2, seed=3, temperature=1.0, logprobs=True, tools=[WEATHER], max_tokens=90
    )
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in answer.choices)
    for choice in answer.choices:
        assert choice.message.tool_calls
        assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)
        for call in choice.message.tool_calls[: -1 if choice.finish_reason == "length" else None]:
            assert set(json.loads(call.function.arguments)) == {"city", "days"}
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == len(ids)


def test_a_call_and_its_result_are_sent_back(client: openai.OpenAI, checkpoint: Path) -> None:
    message = ask(client, tool_choice=NAMED).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "30"}
    answer = ask(client, messages=[QUESTION, message.model_dump(), result], max_tokens=8, tools=openai.NOT_GIVEN)
    called = f'{{"name": "get_weather", "arguments": {message.tool_calls[0].function.arguments}}}'
    prompt = (
        f"user:Is it hot?</s>assistant:<tool_call>\n{called}\n</tool_call></s>"
        "user:<tool_response>\n30\n</tool_response></s>assistant:"
    )
    assert answer.choices[0].message.content == Unsplit(checkpoint).say(prompt, 8)


def test_strict_tools_leave_other_answers_alone(client: openai.OpenAI) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    plain, held = (
        ask(client, tools=[tool], max_tokens=12).choices[0].message.content for tool in (WEATHER, strict)
    )
    assert plain == held


def test_tools_that_may_not_be_called_are_not_shown(client: openai.OpenAI) -> None:
    without = ask(client, tools=openai.NOT_GIVEN, max_tokens=8)
    hidden = ask(client, tool_choice="none", max_tokens=8)
    assert hidden.choices[0].message == without.choices[0].message
    assert hidden.usage.prompt_tokens == without.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_what_is_refused_is_named(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **options)
    assert (refused.value.param, refused.value.code) == (param, "unsupported_parameter")


def test_a_batch_calls_tools(
    run: Any,
    checkpoint: Path,
    address: str,
    tmp_path: Path,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same call as over HTTP."""
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    body = {"model": "tiny", "messages": [QUESTION], "max_tokens": 150, "temperature": 0}
    body |= {"tools": [WEATHER, CLOCK], "tool_choice": NAMED}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(line) + "\n")
    done = run("batch", source, "-o", output, "--model", checkpoint, "--broker", address, "--json")
    assert done.code == 0, done.stderr
    (choice,) = json.loads(output.read_text())["response"]["body"]["choices"]
    over_http = ask(client, tool_choice=NAMED).choices[0]
    assert choice["finish_reason"] == over_http.finish_reason == "tool_calls"
    (call,), (other,) = choice["message"]["tool_calls"], over_http.message.tool_calls
    assert call["function"] == other.function.model_dump()
