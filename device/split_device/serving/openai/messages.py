"""Messages of a conversation in OpenAI's format, those included that a client got as answers and sends back."""

from __future__ import annotations

from typing import Any, Literal, cast

import msgspec

from split_device.generation.tools import ToolCall
from split_device.jobs.job import Message
from split_device.serving.fields import ApiError, convert, present, supported
from split_device.serving.openai.content import with_images

#: Fields that are accepted and have no effect. Annotations cite the sources of an answer.
_IGNORED = frozenset({"name", "annotations"})

#: Fields of answers that are not supported, with the values at which they have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"refusal": ("",), "function_call": ({},), "audio": ({},)}

#: The same for fields that only messages of the assistant have.
_ASSISTANT: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "reasoning": ("",), "reasoning_content": ("",)}


class _TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    text: str


class _Called(msgspec.Struct, frozen=True):
    name: str
    #: JSON text; or an object, as chat templates show it.
    arguments: str | dict[str, Any] = "{}"

    def text(self) -> str:
        return self.arguments if isinstance(self.arguments, str) else msgspec.json.encode(self.arguments).decode()


class _Call(msgspec.Struct, frozen=True):
    id: str
    function: _Called
    type: Literal["function"] = "function"


_Content = str | list[_TextPart]


class _ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="role"):
    content: _Content

    def message(self) -> Message:
        role = str(self.__struct_config__.tag)
        return Message("system" if role == "developer" else role, _text(self.content))


class _System(_ChatMessage, frozen=True, tag="system"):
    pass


class _Developer(_ChatMessage, frozen=True, tag="developer"):
    pass


class _User(_ChatMessage, frozen=True, tag="user"):
    pass


class _Tool(_ChatMessage, frozen=True, tag="tool"):
    tool_call_id: str

    def message(self) -> Message:
        return Message("tool", _text(self.content), tool_call_id=self.tool_call_id)


class _Assistant(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="role", tag="assistant"
):
    content: _Content | None = None
    tool_calls: list[_Call] = []
    reasoning_content: str = ""
    reasoning: str = ""

    def message(self) -> Message:
        calls = tuple(
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.text())
            for call in self.tool_calls
        )
        thought = self.reasoning_content or self.reasoning
        return Message(
            "assistant",
            _text(self.content or ""),
            tool_calls=calls or msgspec.UNSET,
            reasoning=thought or msgspec.UNSET,
        )


_AnyMessage = _System | _Developer | _User | _Tool | _Assistant


def parse_messages(messages: object) -> tuple[Message, ...]:
    """The messages of a conversation. Raises ApiError that names the message and its wrong field."""
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages: expected a list of at least one message", param="messages")
    return tuple(with_images(_parse, message, f"messages[{index}]") for index, message in enumerate(messages))


def _parse(message: object, where: str) -> Message:
    from_assistant = isinstance(message, dict) and message.get("role") == "assistant"
    fields = supported(message, _IGNORED, _NEUTRAL if from_assistant else _NEUTRAL | _ASSISTANT, where)
    if isinstance(parts := fields.get("content"), list):
        fields["content"] = [present(part) if isinstance(part, dict) else part for part in parts]
    if from_assistant and not fields.get("tool_calls") and "content" not in fields:
        raise ApiError(f"{where}.content: required", param=f"{where}.content")
    found: Any = convert(fields, cast("Any", _AnyMessage), where)
    parsed: Message = found.message()
    return parsed


def _text(content: _Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
