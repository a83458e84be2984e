"""Tools that an answer may call, and calls of them: the same in all dialects."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


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
