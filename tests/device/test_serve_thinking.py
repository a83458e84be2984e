"""Thinking before calls that are forced, and before JSON: whole and as deltas, in each dialect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from transformers import AutoTokenizer, LogitsProcessorList

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
from split_device.generation.tool_styles import Thinking
from split_device.generation.tools import Tool, ToolUse

#: Seconds that an answer may take on a busy machine.
PATIENCE = 300.0

#: Added to the characters, as models have them that think. A random model ends its thinking by chance alone.
MARKS = ("<think>", "</think>")
OPENS, CLOSES = tiny.VOCABULARY, tiny.VOCABULARY + 1
ENDS_SOON = {str(CLOSES): 3.0}
NEVER_ENDS = {str(CLOSES): -100.0}

#: Begins to think for the model if it is told to. If not, the model may begin by itself.
TEMPLATE = (
    "{# <think></think> #}{% for message in messages %}{{ message['role'] + ':' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% if enable_thinking %}{{ '<think>\\n' }}"
    "{% endif %}{% endif %}"
)
BEGUN = {"chat_template_kwargs": {"enable_thinking": True}}

CALL: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save("llama", directory, vocab_size=tiny.VOCABULARY + len(MARKS), max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_tokenizer(directory))
    tokenizer.add_tokens(list(MARKS))
    assert tokenizer.convert_tokens_to_ids(list(MARKS)) == [OPENS, CLOSES]
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with serving_here(checkpoint) as address:
        command = ["serve", "--port", "0", "--model", str(checkpoint), "--broker", address]
        with running_command(command, env={"LAMBDA_SPLIT_API_KEY": KEY}) as (_, facts):
            yield facts["url"]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


def ask(client: openai.OpenAI, extra: dict[str, Any] = BEGUN, **options: Any) -> Any:
    usual: dict[str, Any] = {"messages": [QUESTION], "max_tokens": 300, "temperature": 1.0, "seed": 3}
    usual |= {"logit_bias": ENDS_SOON, "extra_body": extra}
    return client.chat.completions.create(model="tiny", **usual | options)


def streamed(client: openai.OpenAI, **options: Any) -> tuple[str, str, list[Any], list[str], str]:
    """What was thought and said, the deltas of calls, the order in which these came, and how it ended."""
    reasoning, content, calls, order = "", "", [], []
    for chunk in ask(client, stream=True, **options):
        (choice,) = chunk.choices
        delta = choice.delta
        thought = getattr(delta, "reasoning_content", None) or ""
        kinds = [("thought", thought), ("said", delta.content), ("called", delta.tool_calls)]
        order += [kind for kind, value in kinds if value and order[-1:] != [kind]]
        reasoning, content = reasoning + thought, content + (delta.content or "")
        calls += delta.tool_calls or ()
    return reasoning, content, calls, order, choice.finish_reason


def unsplit_answer(checkpoint: Path, begun: bool) -> str:
    """What transformers' own `generate` writes with the same seed and constraint, thinking included."""
    unsplit = Unsplit(checkpoint)
    tokenizer = unsplit.tokenizer
    ends = end_tokens(unsplit.model, tokenizer)
    template = ChatTemplate(kwargs={"enable_thinking": begun})
    tool_use = ToolUse(tools=(Tool(name="get_weather", parameters=PARAMETERS),), choice="required", parallel=False)
    format_ = answer_format(tokenizer, template, tool_use)
    constraint = call_constraint(tokenizer, format_, thinking=Thinking(*MARKS, begun=begun))
    assert constraint is not None
    ids = encode_chat(tokenizer, [QUESTION], template=template, tool_use=tool_use)
    grammars = Grammars(tokenizer, unsplit.model.config.vocab_size, ends)
    torch.manual_seed(3)
    output = unsplit.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=300,
        do_sample=True,
        top_k=0,
        sequence_bias={(CLOSES,): 3.0},
        eos_token_id=sorted(ends),
        logits_processor=LogitsProcessorList([ConstraintProcessor(grammars.constraint(constraint), ids.shape[1])]),
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :])).removesuffix("</s>")


def check_thought_and_call(reasoning: str, arguments: str) -> None:
    assert reasoning.strip() == reasoning != ""
    assert not any(mark in reasoning for mark in MARKS)
    given = json.loads(arguments)
    assert given["city"] in ("Oslo", "Rome")
    assert 1 <= given["days"] <= 9


def test_a_call_that_is_forced_comes_after_what_is_thought(client: openai.OpenAI, checkpoint: Path) -> None:
    """Deltas have what a whole answer has, which is what the unsplit model says."""
    whole = ask(client, **CALL).choices[0]
    (call,) = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    check_thought_and_call(whole.message.reasoning_content, call.function.arguments)
    reasoning, content, deltas, order, finished = streamed(client, **CALL)
    assert (order, finished, content) == (["thought", "called"], "tool_calls", "")
    assert reasoning == whole.message.reasoning_content
    assert deltas[0].function.name == "get_weather"
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert len(deltas) > 10
    called = f'<tool_call>\n{{"name": "get_weather", "arguments": {call.function.arguments}}}\n</tool_call>'
    thought, _, answer = unsplit_answer(checkpoint, begun=True).partition("</think>")
    assert (thought.strip(), answer.strip()) == (reasoning, called)


def test_a_model_may_begin_to_think_by_itself(client: openai.OpenAI, checkpoint: Path) -> None:
    bias = ENDS_SOON | {str(OPENS): 3.0}
    reasoning, content, deltas, order, finished = streamed(client, extra={}, logit_bias=bias, **CALL)
    assert (order, finished, content) == (["thought", "called"], "tool_calls", "")
    check_thought_and_call(reasoning, "".join(delta.function.arguments for delta in deltas))
    # Not by the characters of the mark, either.
    letter = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("h")
    bias = ENDS_SOON | {str(OPENS): -100.0, str(letter): -100.0}
    reasoning, content, deltas, order, _ = streamed(client, extra={}, logit_bias=bias, **CALL)
    assert (order, content, reasoning) == (["called"], "", "")
    assert json.loads("".join(delta.function.arguments for delta in deltas))


def test_json_comes_after_what_is_thought(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    whole = ask(client, response_format=form).choices[0]
    check_thought_and_call(whole.message.reasoning_content, whole.message.content)
    reasoning, content, _, order, finished = streamed(client, response_format=form)
    assert (order, finished) == (["thought", "said"], "stop")
    assert (reasoning, content) == (whole.message.reasoning_content, whole.message.content)


def test_thinking_without_an_end_ends_with_the_answer_s_length(client: openai.OpenAI) -> None:
    for options in (CALL, {"response_format": {"type": "json_object"}}):
        reasoning, content, deltas, _, finished = streamed(client, logit_bias=NEVER_ENDS, max_tokens=100, **options)
        assert (content, deltas, finished) == ("", [], "length")
        assert reasoning


def test_the_other_dialects(client: openai.OpenAI, url: str) -> None:
    """They take no bias, so that the thinking is what fits into a short answer."""
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}]
    options: Any = {"model": "tiny", "input": "Hot?", "tools": tools, "tool_choice": "required", "temperature": 0}
    events = list(
        client.responses.create(
            stream=True, max_output_tokens=20, reasoning={"effort": None}, extra_body=BEGUN, **options
        )
    )
    thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    (item,) = events[-1].response.output
    assert item.type == "reasoning"
    assert item.content[0].text == thought != ""
    assert events[-1].response.status == "incomplete"
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": [QUESTION],
        "max_tokens": 20,
        "temperature": 0,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [{"name": "get_weather", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "any"},
    }
    said = httpx2.post(f"{url}/messages", json=body, headers={"x-api-key": KEY}, timeout=PATIENCE).json()
    assert [block["type"] for block in said["content"]] == ["thinking"]
    assert said["stop_reason"] == "max_tokens"
