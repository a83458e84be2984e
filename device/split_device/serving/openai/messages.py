"""Messages of a conversation in OpenAI's format, those included that a client got as answers and sends back."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from split_device.jobs.job import Message
from split_device.serving.fields import ApiError, convert, present, supported

#: Fields that are accepted and have no effect. Annotations cite the sources of an answer.
_IGNORED = frozenset({"name", "annotations"})

#: Fields of answers and of tools that are not supported, with the values at which they have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "refusal": ("",),
    "tool_calls": ([],),
    "function_call": ({},),
    "audio": ({},),
    "reasoning": ("",),
    "reasoning_content": ("",),
}


class _TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class _ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


def parse_messages(messages: object) -> tuple[Message, ...]:
    """The messages of a conversation. Raises ApiError that names the message and its wrong field."""
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages: expected a list of at least one message", param="messages")
    return tuple(_parse(message, f"messages[{index}]") for index, message in enumerate(messages))


def _parse(message: object, where: str) -> Message:
    fields = supported(message, _IGNORED, _NEUTRAL, where)
    if isinstance(parts := fields.get("content"), list):
        fields["content"] = [present(part) if isinstance(part, dict) else part for part in parts]
    return convert(fields, _ChatMessage, where).message()
