"""Tools that an answer may call, and calls of them: the same in all dialects."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

#: Names that tools can have.
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    #: A JSON Schema of the arguments, an object; None for no arguments.
    parameters: dict[str, Any] | None = None
    #: Whether the arguments have to fit the schema, also where the model calls the tool of its own will.
    strict: bool = False


class NamedTool(msgspec.Struct, frozen=True):
    """The one tool that the model has to call."""

    name: str


#: Whether the model calls tools: as it likes, not at all, at least once, or a certain one.
ToolChoice = Literal["auto", "none", "required"] | NamedTool


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool, as it stands in a conversation."""

    id: str
    name: str
    #: The arguments as JSON text.
    arguments: str


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """The tools of a request, and how they may be called."""

    tools: tuple[Tool, ...]
    choice: ToolChoice = "auto"
    #: Whether one answer may call several tools.
    parallel: bool = True

    @property
    def forced(self) -> bool:
        """Whether the answer has to be calls, and nothing else."""
        return self.choice == "required" or isinstance(self.choice, NamedTool)

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        if isinstance(self.choice, NamedTool):
            return tuple(tool for tool in self.tools if tool.name == self.choice.name)
        return () if self.choice == "none" else self.tools


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a call of a tool. The first piece of a call has its id and name, the others only arguments."""

    #: Which of the answer's calls it is, from 0.
    index: int
    #: A part of the arguments' JSON text.
    arguments: str
    id: str = ""
    name: str = ""


def joined_calls(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """The calls of which these are the pieces."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        known = calls.get(delta.index)
        calls[delta.index] = (
            ToolCall(id=delta.id, name=delta.name, arguments=delta.arguments)
            if known is None
            else msgspec.structs.replace(known, arguments=known.arguments + delta.arguments)
        )
    return tuple(calls.values())
