"""Constraints that make an answer call tools, or make the arguments of the calls that it has fit their schemas."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec

from split_common.errors import UnsupportedField
from split_device.generation.answers import AnswerFormat
from split_device.generation.special_tokens import special_tokens
from split_device.generation.structured import StructuredOutputs
from split_device.generation.tagged import Tag, tagged
from split_device.generation.tool_styles import CallForm, Thinking
from split_device.generation.tools import Tool, ToolUse

#: The schema of a tool that takes no arguments.
_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

_OBJECT: dict[str, Any] = {"type": "object"}


def call_constraint(
    tokenizer: Any,
    format_: AnswerFormat,
    structured: StructuredOutputs | None = None,
    thinking: Thinking | None = None,
) -> StructuredOutputs | None:
    """What an answer has to look like if it may call tools, or has to.

    If a call is forced, the answer is nothing but calls, and their arguments fit the tools' schemas. If not, calls
    fit the schemas of tools that are `strict`, and what is said instead fits `structured`.

    Args:
        tokenizer: the model's tokenizer, of transformers.
        format_: how answers are read.
        structured: what an answer has to look like that calls no tool; None for any text.
        thinking: what the model may think before; None for nothing.

    Returns:
        None if any text will do.

    Raises:
        UnsupportedField: this cannot be enforced in the model's style of calls.
        ConfigError: a keyword of a schema has a wrong type.
    """
    tool_use, form = format_.tool_use, format_.form
    if tool_use is None or not tool_use.callable:
        return structured if structured is None or thinking is None else _thought(tokenizer, structured, thinking)
    if tool_use.forced:
        found = _forced(tokenizer, form, tool_use)
    elif structured is not None:
        found = _or_structured(tokenizer, form, tool_use, structured)
    elif any(tool.strict for tool in tool_use.callable):
        found = _strict(tokenizer, form, tool_use)
    else:
        return None
    return found if thinking is None else _after_thinking(tokenizer, found, thinking)


def _forced(tokenizer: Any, form: CallForm, tool_use: ToolUse) -> StructuredOutputs:
    several = tool_use.choice == "required" and tool_use.parallel and form.separator is not None
    return tagged(
        [_tag(form, tool, _schema(tool)) for tool in tool_use.callable],
        several=several,
        before=form.start,
        separator=form.separator or "",
        after=form.end,
        special=_added_tokens(tokenizer, _texts(form)),
    )


def _thought(tokenizer: Any, structured: StructuredOutputs, thinking: Thinking) -> StructuredOutputs:
    """JSON after what the model thinks. Other constraints are for the whole answer, unless the prompt begins it."""
    if not thinking.begun and structured.json_object is None and structured.json is None:
        return structured
    found = tagged([Tag(begin="", schema=_json_schema(structured), flexible=True)])
    return _after_thinking(tokenizer, found, thinking)


def _json_schema(structured: StructuredOutputs) -> dict[str, Any] | bool:
    schema = _OBJECT if structured.json_object else structured.json
    if schema is None:
        raise UnsupportedField(
            "structured outputs other than JSON cannot follow thinking, or stand beside tools", "structured_outputs"
        )
    return schema


def _or_structured(
    tokenizer: Any, form: CallForm, tool_use: ToolUse, structured: StructuredOutputs
) -> StructuredOutputs:
    """One call, or JSON."""
    calls = [_tag(form, tool, _loose(tool), whole=True) for tool in tool_use.callable]
    json_ = Tag(begin="", schema=_json_schema(structured), flexible=True)
    return tagged([*calls, json_], special=_added_tokens(tokenizer, _texts(form)))


def _strict(tokenizer: Any, form: CallForm, tool_use: ToolUse) -> StructuredOutputs:
    """Any text, and calls within it."""
    special = {text: id_ for id_, text in special_tokens(tokenizer).items()}
    calls = [_tag(form, tool, _loose(tool), whole=True) for tool in tool_use.callable]
    opening = form.start + form.before
    if opening.startswith("{"):
        # The answer is a call, or it begins otherwise.
        return _reworded(tagged(calls), "start: any", "start: any | TEXT", "TEXT: /([^{\\s](.|\\n)*)?/")
    trigger = next((text for text in special if opening.startswith(text)), opening.partition("\n")[0])
    if trigger == "<|channel|>" or not trigger.strip() or (trigger not in special and _has(special, trigger)):
        raise UnsupportedField("tools[].function.strict: this model's calls cannot be held to it", "tools")
    rest = [msgspec.structs.replace(tag, begin=tag.begin.removeprefix(trigger)) for tag in calls]
    used = {text: id_ for text, id_ in special.items() if _has([text], *_texts(form))}
    return tagged(rest, trigger=trigger, special=used)


def _tag(form: CallForm, tool: Tool, schema: dict[str, Any], whole: bool = False) -> Tag:
    """A call of a tool; with what comes before and after all calls, if it is the whole answer."""
    start, end = (form.start, form.end) if whole else ("", "")
    return Tag(begin=f"{start}{form.before}{tool.name}{form.between}", schema=schema, end=form.after + end)


def _loose(tool: Tool) -> dict[str, Any]:
    """The schema of a tool that is called of the model's own will."""
    return _schema(tool) if tool.strict else _OBJECT


def _schema(tool: Tool) -> dict[str, Any]:
    return _NOTHING if tool.parameters is None else {"type": "object", **tool.parameters}


def _after_thinking(tokenizer: Any, structured: StructuredOutputs, thinking: Thinking) -> StructuredOutputs:
    ids = {text: id_ for id_, text in special_tokens(tokenizer).items()}

    def mark(text: str) -> str:
        return f"<[{ids[text]}]>" if text in ids else json.dumps(text)

    lazy = "" if thinking.closes in ids else "[lazy]"
    thought = f"thought{lazy}: THOUGHT {mark(thinking.closes)}"
    start = "thought BLANK answer" if thinking.begun else f"({mark(thinking.opens)} thought BLANK)? answer"
    rules = [thought, "THOUGHT: /(.|\\n)*/", "BLANK: /\\s*/"]
    return _reworded(structured, "start:", f"start: {start}\nanswer:", *rules)


def _reworded(structured: StructuredOutputs, old: str, new: str, *rules: str) -> StructuredOutputs:
    """A grammar of `tagged` with another beginning, and more rules."""
    assert structured.grammar is not None
    return StructuredOutputs(grammar="\n".join([structured.grammar.replace(old, new, 1).rstrip(), *rules]) + "\n")


def _texts(form: CallForm) -> tuple[str, ...]:
    return form.start, form.before, form.between, form.after, form.separator or "", form.end


def _has(names: Iterable[str], *texts: str) -> bool:
    return any(name in text for name in names for text in texts)


def _added_tokens(tokenizer: Any, texts: Iterable[str]) -> dict[str, int]:
    """The tokens beside those of ordinary text that occur in some texts: models have learnt to write these."""
    added = {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    return {name: id_ for name, id_ in added.items() if name.strip() and any(name in text for text in texts)}
