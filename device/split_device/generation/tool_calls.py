"""Reads answers as they come: what is said, what was thought before, and which tools are called."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from split_common.compat.chat_parsing import RegionParser
from split_device.generation.tool_styles import argument_region, object_keys
from split_device.generation.tools import Tool, ToolCallDelta

#: Fields of response templates that hold what a model thinks.
REASONING = ("reasoning_content", "reasoning", "thinking")

#: What may stand in the place of `arguments`.
_ARGUMENTS = ("arguments", "parameters")

#: Most characters before the arguments of a call that is read as it comes. Names of tools have 128 at most.
_MAX_HEAD = 1024


@dataclass(frozen=True)
class AnswerPiece:
    """A piece of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)

    def __add__(self, other: AnswerPiece) -> AnswerPiece:
        return AnswerPiece(self.text + other.text, self.reasoning + other.reasoning, (*self.calls, *other.calls))


class AnswerParser:
    """Reads one answer. However its text is cut into pieces, the sum of what it returns is the same.

    Arguments of a call are returned as they come, as the model writes them. They may end early, or not be JSON.
    What looks like a call, and is not, is text.

    Args:
        template: a response template, as transformers documents it.
        prefix: the prompt, or what of it belongs to the answer.
        tools: those that can be called.
        parallel: whether one answer may call several tools. If not, it ends with the first call.
        call_id: makes the id of a call of its index.

    Raises:
        ValueError: the template is not one.
    """

    def __init__(
        self,
        template: dict[str, Any],
        prefix: str,
        tools: Sequence[Tool] = (),
        parallel: bool = True,
        call_id: Callable[[int], str] = "call_{}".format,
    ) -> None:
        described = [{"function": {"name": tool.name, "parameters": tool.parameters or {}}} for tool in tools]
        self._parser = RegionParser(template, prefix=prefix, tools=described)
        self._calls_field = template["fields"].get("tool_calls", {})
        self._parallel = parallel
        self._call_id = call_id
        self._calls = 0
        #: How the call is read that is open.
        self._reader: _CallReader | None = None
        self._opened = ""
        self._text, self._reasoning = _Trimmed(keeps_start=True), _Trimmed()
        #: Whether the answer has ended with a call, though the model might go on.
        self.done = False
        #: Whether what came last is thinking.
        self.thinks = False
        for event in self._parser.initial_events:
            self._read({**event, "text": ""})

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._calls > 0

    def push(self, text: str) -> AnswerPiece:
        """Adds text. Returns what it completes, which may be nothing."""
        return AnswerPiece() if self.done or not text else self._pieces(self._parser.feed(text))

    def end(self) -> AnswerPiece:
        """Ends the answer. Returns what was held back."""
        if self.done:
            return AnswerPiece()
        piece = self._pieces(self._parser.finalize()[1])
        # White space that ends an answer is part of it; that before a call is not.
        return piece if self.called else piece + AnswerPiece(self._text.end())

    def _pieces(self, events: list[dict[str, Any]]) -> AnswerPiece:
        piece = AnswerPiece()
        for event in events:
            if self.done:
                break
            piece += self._read(event)
        return piece

    def _read(self, event: dict[str, Any]) -> AnswerPiece:
        name = event["field"]
        if name == "tool_calls":
            return self._read_call(event)
        if name in REASONING:
            if event["type"] == "region_open":
                self._text.interrupt()
                self.thinks = True
            if event["type"] == "region_close":
                self._reasoning.interrupt()
                self.thinks = False
            return AnswerPiece(reasoning=self._reasoning.push(event.get("text", "")))
        return AnswerPiece(self._text.push(event.get("text", ""))) if name == "content" else AnswerPiece()

    def _read_call(self, event: dict[str, Any]) -> AnswerPiece:
        if event["type"] == "region_open":
            self._reader = _CallReader(self._calls_field, event.get("captures", {}))
            self._opened = event.get("opened", "")
            return AnswerPiece()
        reader = self._reader
        assert reader is not None
        if event["type"] == "region_chunk":
            return self._delta(reader, reader.push(event["text"]))
        self._reader = None
        if reader.name is not None:
            self._end_call()
            return AnswerPiece()
        found = _calls_of(event.get("value"))
        if not found:
            return AnswerPiece(self._text.push(self._opened + reader.text))
        deltas = []
        for name, arguments in found[: None if self._parallel else 1]:
            deltas += [
                ToolCallDelta(self._calls, "", self._call_id(self._calls), name),
                ToolCallDelta(self._calls, arguments),
            ]
            self._end_call()
        return AnswerPiece(calls=tuple(deltas))

    def _delta(self, reader: _CallReader, arguments: str) -> AnswerPiece:
        if not arguments or reader.name is None:
            return AnswerPiece()
        begun, reader.begun = reader.begun, True
        index = self._calls
        first = () if begun else (ToolCallDelta(index, "", self._call_id(index), reader.name),)
        return AnswerPiece(calls=(*first, ToolCallDelta(index, arguments)))

    def _end_call(self) -> None:
        self._calls += 1
        self._text.interrupt()
        self.done = not self._parallel


class _CallReader:
    """Reads one call as its text comes: its name, and the extent of its arguments.

    Only calls of which the name comes first are read so. `name` is None of others, and until it has come.
    """

    def __init__(self, calls: dict[str, Any], captures: dict[str, str]) -> None:
        self.text = ""
        self.begun = False
        self.name: str | None = None
        self._head: re.Pattern[str] | None = None
        if (capture := argument_region(calls)) is not None:
            self._captured = captures.get(capture, "").strip()
            self._head = re.compile(r"\s*(?=\{)")
        elif (keys := object_keys(calls)) is not None:
            arguments = "|".join(map(re.escape, dict.fromkeys((keys[1], *_ARGUMENTS))))
            self._captured = ""
            self._head = re.compile(
                rf'\s*\{{\s*"{re.escape(keys[0])}"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:{arguments})"\s*:\s*(?=\{{)',
                re.DOTALL,
            )
        self._extent = _Extent()

    def push(self, text: str) -> str:
        """Adds text. Returns the part of the arguments that it has."""
        if self.name is not None:
            return self._extent.push(text)
        self.text += text
        if self._head is None or (head := self._head.match(self.text)) is None:
            if len(self.text) > _MAX_HEAD:
                self._head = None
            return ""
        try:
            name = self._captured or json.loads(head[1])
        except ValueError:
            self._head = None
            return ""
        self.name = str(name)
        return self._extent.push(self.text[head.end() :])


class _Extent:
    """Where a JSON object ends in a text that begins with it."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = self._ended = False

    def push(self, text: str) -> str:
        """The part of a text that belongs to the object."""
        for at, character in enumerate(text):
            if self._ended:
                return text[:at]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self._ended = self._depth == 0
        return text


class _Trimmed:
    """A text in pieces, without the white space at its start and before interruptions.

    Args:
        keeps_start: the white space at its very start is part of it.
    """

    def __init__(self, keeps_start: bool = False) -> None:
        self._at_start = not keeps_start
        self._held = ""

    def push(self, text: str) -> str:
        if self._at_start:
            text = text.lstrip()
        if not text:
            return ""
        self._at_start = False
        text = self._held + text
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept

    def interrupt(self) -> None:
        self._held, self._at_start = "", True

    def end(self) -> str:
        held, self._held = self._held, ""
        return held


def _calls_of(value: Any) -> list[tuple[str, str]]:
    """The names and arguments of what a response template made of a region; none if they are not calls."""
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
            return []
        arguments: Any = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        found.append((name, text))
    return found
