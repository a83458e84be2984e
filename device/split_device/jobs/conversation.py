"""Conversations of tasks as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from split_common.errors import ConfigError
from split_device.generation.tools import ToolCall, joined_calls
from split_device.jobs.job import JobProgress, Message


def chat_messages(messages: Sequence[Message], chat_template: str) -> list[dict[str, Any]]:
    """Messages as transformers documents them: with calls of which the arguments are objects.

    Args:
        chat_template: its text, which says by what name it takes what an assistant thought.
    """
    by_thinking = "thinking" in chat_template and "reasoning_content" not in chat_template
    names: dict[str, str] = {}
    found = []
    for message in messages:
        fields: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning is not msgspec.UNSET:
            fields["thinking" if by_thinking else "reasoning_content"] = message.reasoning
        if message.tool_calls is not msgspec.UNSET:
            names |= {call.id: call.name for call in message.tool_calls}
            fields["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.tool_call_id is not msgspec.UNSET:
            fields["tool_call_id"] = message.tool_call_id
            if message.tool_call_id in names:
                fields["name"] = names[message.tool_call_id]
        found.append(fields)
    return found


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": _parsed(call.arguments)},
    }


def _parsed(arguments: str) -> Any:
    """Arguments as an object; as they are if a model wrote something else."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


class _Called(msgspec.Struct, frozen=True):
    name: str
    arguments: str | dict[str, Any] = "{}"


class _Call(msgspec.Struct, frozen=True):
    id: str
    function: _Called
    type: Literal["function"] = "function"


class _Given(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: str
    content: str | None = None
    tool_calls: tuple[_Call, ...] = ()
    tool_call_id: str | None = None
    reasoning_content: str = ""


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages in OpenAI's format, those of tools and with calls included.

    Raises:
        ConfigError: one is not a message. The error names its field.
    """
    try:
        return tuple(map(_message, msgspec.convert([dict(each) for each in messages], list[_Given])))
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"the conversation is not one: {error}") from None


def _message(given: _Given) -> Message:
    if given.content is None and not given.tool_calls:
        raise ConfigError(f"the conversation is not one: a message of the {given.role} has no content")
    calls = tuple(
        ToolCall(id=call.id, name=call.function.name, arguments=_arguments(call.function.arguments))
        for call in given.tool_calls
    )
    return Message(
        given.role,
        given.content or "",
        tool_calls=calls or msgspec.UNSET,
        reasoning=given.reasoning_content or msgspec.UNSET,
        tool_call_id=msgspec.UNSET if given.tool_call_id is None else given.tool_call_id,
    )


def _arguments(arguments: str | dict[str, Any]) -> str:
    return arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()


def answer_message(progress: JobProgress) -> dict[str, Any]:
    """An answer as a message in OpenAI's format, which `parse_messages` takes back."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in joined_calls(progress.tool_calls)
    ]
    return {
        "role": "assistant",
        "content": progress.text or (None if calls else ""),
        **({"reasoning_content": progress.reasoning} if progress.reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }
