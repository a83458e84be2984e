"""Constraints on calls: which texts they let through."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import AutoTokenizer

import tiny
from split_common.errors import UnsupportedField
from split_device.generation.answers import answer_format
from split_device.generation.call_grammar import call_constraint
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.constraint import Grammars
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tool_styles import CallForm, call_style, thinking_of
from split_device.generation.tools import NamedTool, Tool, ToolChoice, ToolUse

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
STRICT = Tool(name="weather", parameters=SCHEMA, strict=True)
FREE = Tool(name="weather", parameters=SCHEMA)
CLOCK = Tool(name="now")

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, tiny.VOCABULARY, [tokenizer.eos_token_id])


def fits(grammars: Grammars, tokenizer: Any, structured: StructuredOutputs | None, text: str) -> bool:
    """Whether a constraint lets a whole answer through."""
    assert structured is not None
    constraint = grammars.constraint(structured)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not constraint.mask()[token]:
            return False
        constraint.accept(token)
    return bool(constraint.mask()[tokenizer.eos_token_id])


def constraint(
    tokenizer: Any, choice: ToolChoice, *tools: Tool, parallel: bool = True, **options: Any
) -> StructuredOutputs | None:
    use = ToolUse(tools=tools, choice=choice, parallel=parallel)
    return call_constraint(tokenizer, answer_format(tokenizer, ChatTemplate(), use), **options)


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        ("required", True, [CALL, OTHER, f"{CALL}\n{OTHER}"], ["Hello", WRONG, f"Hello {CALL}", f"{CALL} and"]),
        ("required", False, [CALL, OTHER], [f"{CALL}\n{OTHER}", "Hello"]),
        (NamedTool("now"), True, [OTHER], [CALL, f"{OTHER}\n{OTHER}", "Hello"]),
        ("auto", True, ["Hello", CALL, f"Hello {CALL} a < b {OTHER}"], [WRONG, f"Hello {WRONG}"]),
    ],
)
def test_what_an_answer_may_be(
    grammars: Grammars, tokenizer: Any, choice: ToolChoice, parallel: bool, good: list[str], bad: list[str]
) -> None:
    found = constraint(tokenizer, choice, STRICT, CLOCK, parallel=parallel)
    assert [text for text in good if not fits(grammars, tokenizer, found, text)] == []
    assert [text for text in bad if fits(grammars, tokenizer, found, text)] == []


def test_tools_that_are_not_strict_leave_an_answer_free(tokenizer: Any) -> None:
    assert constraint(tokenizer, "auto", FREE, CLOCK) is None
    assert constraint(tokenizer, "none", STRICT) is None


def test_a_call_or_json(grammars: Grammars, tokenizer: Any) -> None:
    """Where an answer has to fit a schema, a tool may still be called."""
    found = constraint(tokenizer, "auto", FREE, structured=StructuredOutputs(json=SCHEMA))
    assert all(fits(grammars, tokenizer, found, text) for text in (CALL, WRONG, '{\n "city": "Oslo"}'))
    assert not any(fits(grammars, tokenizer, found, text) for text in ("Hello", '{"town": "Oslo"}'))
    with pytest.raises(UnsupportedField, match="other than JSON"):
        constraint(tokenizer, "auto", FREE, structured=StructuredOutputs(regex="a"))


def test_thinking_that_the_prompt_begins_comes_first(grammars: Grammars, tokenizer: Any) -> None:
    thinking = thinking_of("<think></think>", "assistant\n<think>\n")
    ends = "</think>"
    found = constraint(tokenizer, NamedTool("now"), CLOCK, thinking=thinking)
    assert fits(grammars, tokenizer, found, f"Hm. {ends}\n\n{OTHER}")
    assert not fits(grammars, tokenizer, found, OTHER)
    read = answer_format(tokenizer, ChatTemplate())
    json = call_constraint(tokenizer, read, StructuredOutputs(json=SCHEMA), thinking)
    assert fits(grammars, tokenizer, json, f'Hm. {ends}\n{{"city":"Oslo"}}')
    assert not fits(grammars, tokenizer, json, '{"city":"Oslo"}')
    assert call_constraint(tokenizer, read, None, thinking) is None
    with pytest.raises(UnsupportedField, match="cannot follow thinking"):
        call_constraint(tokenizer, read, StructuredOutputs(regex="a"), thinking)


def test_thinking_that_the_answer_begins_comes_first_or_not_at_all(grammars: Grammars, tokenizer: Any) -> None:
    thinking = thinking_of("<think></think>", "assistant\n")
    assert thinking is not None
    thought = "<think>\nHm.\n</think>\n\n"
    for choice in (NamedTool("now"), "required"):
        found = constraint(tokenizer, choice, CLOCK, thinking=thinking)
        assert fits(grammars, tokenizer, found, thought + OTHER)
        assert fits(grammars, tokenizer, found, OTHER)
        for wrong in (thought, f"{thought}Hello", f"{thought}{thought}{OTHER}"):
            assert not fits(grammars, tokenizer, found, wrong)
    read = answer_format(tokenizer, ChatTemplate())
    json = call_constraint(tokenizer, read, StructuredOutputs(json=SCHEMA), thinking)
    assert all(fits(grammars, tokenizer, json, f'{begin}{{"city": "Oslo"}}') for begin in ("", thought))
    regex = StructuredOutputs(regex="a")
    assert call_constraint(tokenizer, read, regex, thinking) is regex
    # The prompt has ended it, or the model has not learnt to think.
    assert thinking_of("<think></think>", "<think>\n\n</think>\n\n") is None
    assert thinking_of("", "assistant\n") is None


def test_calls_without_a_mark(grammars: Grammars, tokenizer: Any) -> None:
    """As Llama 3 writes them: an answer that begins otherwise is free."""
    form = call_style("x", reads_tools=True).form
    assert form is not None
    read = answer_format(tokenizer, ChatTemplate(), ToolUse(tools=(STRICT,)))
    found = call_constraint(tokenizer, dataclasses.replace(read, form=form))
    assert fits(grammars, tokenizer, found, '{"name": "weather", "parameters": {"city": "x"}}')
    assert fits(grammars, tokenizer, found, "It is {so}.")
    assert not fits(grammars, tokenizer, found, '{"name": "weather", "parameters": {"town": "x"}}')


def test_what_cannot_be_held_to_a_schema_is_refused(tokenizer: Any) -> None:
    read = answer_format(tokenizer, ChatTemplate(), ToolUse(tools=(STRICT,)))
    with pytest.raises(UnsupportedField, match="strict"):
        call_constraint(tokenizer, dataclasses.replace(read, form=CallForm("<|channel|>", "")))
