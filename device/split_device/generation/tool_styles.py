"""How models write calls of tools: the styles of text that are read back, and that a call can be forced into.

A style is recognized by what the chat template writes, because a template that shows a model its earlier calls
shows them as the model has learnt to write them.

Answers can be anything, and while one is read no other goes on. So repetitions in patterns have bounds: without
them the time would grow with the square of an answer's length. White space before a call is not part of a pattern,
because it is held back anyway.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CallForm:
    """The text of an answer that is nothing but calls.

    It is `start`, then each call as `before`, the tool's name, `between`, the arguments as a JSON object, and
    `after`, with `separator` between two calls, then `end`.
    """

    before: str
    between: str
    after: str = ""
    start: str = ""
    end: str = ""
    #: None if an answer has one call at most.
    separator: str | None = None

    def text(self, name: str, arguments: str) -> str:
        """The text of one call."""
        return f"{self.before}{name}{self.between}{arguments}{self.after}"


@dataclass(frozen=True)
class CallStyle:
    """A style of calls.

    Args:
        marks: texts that a chat template of this style has.
        calls: the field `tool_calls` of a response template, as transformers documents it.
        form: how a call is written if it is forced; None if it is forced in the general form.
        others: the fields of the response template beside the calls, if they have to be certain ones.
    """

    marks: tuple[str, ...]
    calls: dict[str, Any]
    form: CallForm | None = None
    others: dict[str, Any] = field(default_factory=dict)


#: In a pattern of tags: nothing is found from here to the end, because what would close this tag does not come.
#: Without it, every tag that is not closed would be a search to the end.
_TO_THE_END = r".*(*SKIP)(*FAIL)"


def _json_calls(**region: Any) -> dict[str, Any]:
    """Calls of which each region is an object with the tool's name and its arguments."""
    return {"content": "json", "repeats": True, "transform": {"function": "{content}"}, **region}


def _named_calls(**region: Any) -> dict[str, Any]:
    """Calls of which the marker captures the name, and the region has the arguments."""
    function = {"name": "{name}", "arguments": "{content}"}
    return {"content": "json", "repeats": True, "transform": {"function": function}, **region}


def _list_calls(**region: Any) -> dict[str, Any]:
    """Calls that are one list of objects."""
    function = {"name": "{name}", "arguments": "{arguments}"}
    return {
        "content": "json",
        "repeats": True,
        "transform": {"function": function},
        "transform_each": True,
        **region,
    }


def _tagged_calls(tag_pattern: str, **region: Any) -> dict[str, Any]:
    """Calls of which the marker captures the name, and each argument has a tag of its own."""
    return _named_calls(content="xml-inline", content_args={"tag_pattern": tag_pattern}, **region)


_OBJECT = {"before": '{"name": "', "between": '", "arguments": ', "after": "}"}

#: Objects within tags, as Hermes, Qwen and others write them. A template without tools is told to write these.
GENERAL = CallStyle(
    ("<tool_call>",),
    _json_calls(open="<tool_call>", close="</tool_call>"),
    CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", separator="\n"),
)

#: An answer that is nothing but an object. It is read so if a template has tools, and no style that is known.
_BARE = CallStyle(
    ('"parameters": ', '{"name": "'),
    _json_calls(open_pattern=r"\A\s{0,100}(?:<\|python_tag\|>)?(?=\{\s{0,100}\"name\"\s{0,100}:)"),
    CallForm('{"name": "', '", "parameters": ', "}"),
)

_HARMONY = CallStyle(
    ("<|channel|>", "to=functions."),
    _named_calls(
        open_pattern=r"(?:<\|channel\|>\w{1,20} ?)? ?to=functions\."
        r"(?P<name>[\w.-]{1,200}+)[^{}]{0,80}?<\|message\|>",
        close=["<|call|>", "<|end|>"],
    ),
    CallForm("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>"),
    {
        "reasoning_content": {
            "open": "<|channel|>analysis<|message|>",
            "close": "<|end|>",
            "repeats": True,
            "join": "",
        },
        "content": {
            "open_pattern": r"<\|channel\|>(?:final|commentary)(?: <\|constrain\|>\w{1,20})?<\|message\|>",
            "close": ["<|end|>", "<|return|>"],
            "repeats": True,
            "join": "",
        },
    },
)

_END_OF_CALLS = {"content": {"close": "<｜tool▁calls▁end｜>"}}

#: The more particular ones first.
_STYLES = (
    _HARMONY,
    CallStyle(
        ("<tool_call>", "<function="),
        _tagged_calls(
            rf"<parameter=(?P<key>[^<>]+)>(?:\n?(?P<value>.*?)\n?</parameter>|{_TO_THE_END})",
            open_pattern=r"<tool_call>\s{0,100}<function=(?P<name>[^<>]{1,200})>",
            close_pattern=r"</function>\s{0,100}</tool_call>",
        ),
    ),
    CallStyle(
        ("<tool_call>", "<arg_key>"),
        _tagged_calls(
            r"<arg_key>\s*+(?P<key>[^<]*[^<\s])\s*+</arg_key>\s*+"
            rf"<arg_value>(?:(?P<value>.*?)</arg_value>|{_TO_THE_END})",
            open_pattern=r"<tool_call>\s{0,100}(?P<name>[^<\s]{1,200})",
            close="</tool_call>",
        ),
    ),
    GENERAL,
    CallStyle(
        ("[TOOL_CALLS]", "[ARGS]"),
        _named_calls(
            open_pattern=r"\[TOOL_CALLS\](?P<name>[^\[{]{1,200})\[ARGS\]", close_pattern=r"(?=\[TOOL_CALLS\])"
        ),
        CallForm("[TOOL_CALLS]", "[ARGS]", separator=""),
    ),
    CallStyle(
        ("[TOOL_CALLS]",),
        _list_calls(open_pattern=r"\[TOOL_CALLS\]\s{0,100}(?=\[)"),
        CallForm(**_OBJECT, start="[TOOL_CALLS][", end="]", separator=", "),
    ),
    CallStyle(
        ("<|tool_call|>",),
        _list_calls(open_pattern=r"<\|tool_call\|>\s{0,100}(?=\[)"),
        CallForm(**_OBJECT, start="<|tool_call|>[", end="]", separator=", "),
    ),
    CallStyle(
        ("<｜tool▁sep｜>", "```json"),
        _named_calls(
            open_pattern=r"(?:<｜tool▁calls▁begin｜>\s{0,100})?<｜tool▁call▁begin｜>function<｜tool▁sep｜>(?P<name>[^\n]{1,200})\n```json",
            close_pattern=r"```\s{0,100}<｜tool▁call▁end｜>",
        ),
        CallForm(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            "\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "\n",
        ),
        _END_OF_CALLS,
    ),
    CallStyle(
        ("<｜tool▁sep｜>",),
        _named_calls(
            open_pattern=r"(?:<｜tool▁calls▁begin｜>\s{0,100})?<｜tool▁call▁begin｜>(?P<name>[^<]{1,200})<｜tool▁sep｜>",
            close="<｜tool▁call▁end｜>",
        ),
        CallForm(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "",
        ),
        _END_OF_CALLS,
    ),
)

#: What opens and closes a model's thinking.
_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def call_style(chat_template: str, reads_tools: bool) -> CallStyle:
    """The style in which a model calls tools.

    Args:
        chat_template: its text.
        reads_tools: whether the template shows tools to the model. If not, they are shown in the general form.
    """
    if not reads_tools:
        return GENERAL
    return next((style for style in _STYLES if all(mark in chat_template for mark in style.marks)), _BARE)


def response_template(chat_template: str, style: CallStyle | None) -> dict[str, Any] | None:
    """A response template, as transformers documents it, for a tokenizer that has none; None if nothing is to read.

    It takes the part of the prompt that belongs to the answer, and not the whole.

    Args:
        style: how tools are called; None if they are not.
    """
    fields = _thinking(chat_template)
    if style is not None:
        fields |= style.others | {"tool_calls": style.calls}
    return {"start_anchor_pattern": r"\A", "fields": {"content": {}} | fields} if fields else None


def _thinking(chat_template: str) -> dict[str, Any]:
    if all(mark in chat_template for mark in _HARMONY.marks):
        return dict(_HARMONY.others)
    found = next(((opens, closes) for opens, closes in _THINKING if closes in chat_template), None)
    if found is None:
        return {}
    return {"reasoning_content": {"open": found[0], "close": found[1], "repeats": True, "join": ""}}


def open_thinking(prompt: str) -> tuple[str, str] | None:
    """What has opened a thinking at a prompt's end, and what will close it; None if none is open."""
    return next((marks for marks in _THINKING if prompt.rstrip().endswith(marks[0])), None)


@dataclass(frozen=True)
class Thinking:
    """How an answer begins with what a model thinks."""

    opens: str
    closes: str
    #: Whether the prompt has begun it. If not, the answer may begin it, or have none.
    begun: bool


def thinking_of(chat_template: str, opening: str) -> Thinking | None:
    """The thinking with which an answer begins; None if it has none, or the prompt has ended it.

    Args:
        chat_template: its text.
        opening: what it writes before an answer.
    """
    if (marks := open_thinking(opening)) is not None:
        return Thinking(*marks, begun=True)
    if all(mark in chat_template for mark in _HARMONY.marks):
        return None
    marks = next((marks for marks in _THINKING if all(mark in chat_template for mark in marks)), None)
    if marks is None or opening.rstrip().endswith(marks[1]):
        return None
    return Thinking(*marks, begun=False)


def form_of(calls: dict[str, Any]) -> CallForm | None:
    """The form of a response template's own calls, if each is an object between two texts; None for others."""
    opens, closes = calls.get("open"), calls.get("close")
    if not isinstance(opens, str) or not isinstance(closes, str) or calls.get("content") != "json":
        return None
    keys = object_keys(calls)
    if keys is None or calls.get("content_args"):
        return None
    before, between = (json.dumps(key) for key in keys)
    return CallForm(f'{opens}{{{before}: "', f'", {between}: ', f"}}{closes}", separator="")


def object_keys(calls: dict[str, Any]) -> tuple[str, str] | None:
    """The keys of name and arguments, if the field's regions are objects that have both; None for others."""
    transform = calls.get("transform")
    if calls.get("content") != "json" or calls.get("transform_each") or not isinstance(transform, dict):
        return None
    function = transform.get("function", transform)
    if function == "{content}":
        return "name", "arguments"
    if not isinstance(function, dict):
        return None
    found = [str(function.get(name)) for name in ("name", "arguments")]
    if not all(value.startswith("{content.") for value in found):
        return None
    name, arguments = (value[len("{content.") : -1] for value in found)
    return name, arguments


def argument_region(calls: dict[str, Any]) -> str | None:
    """What captures the name, if the field's regions are the arguments as JSON; None for others."""
    transform = calls.get("transform")
    if calls.get("content") != "json" or calls.get("transform_each") or not isinstance(transform, dict):
        return None
    function = transform.get("function", transform)
    if not isinstance(function, dict) or function.get("arguments") != "{content}":
        return None
    name = str(function.get("name"))
    return name.strip("{}") if name.startswith("{") and "." not in name else None
