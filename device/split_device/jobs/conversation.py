"""Conversations of tasks as chat templates take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from split_device.generation.tools import ToolCall
from split_device.jobs.job import Message


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
