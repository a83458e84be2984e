"""Conversations in Anthropic's format: a system prompt, and messages of blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from split_device.generation.tools import ToolCall
from split_device.jobs.job import Message, MessageImage
from split_device.serving.fields import ApiError, convert, present
from split_device.serving.media import image_data, parse_image_url

#: Fields of blocks that are accepted and have no effect. A signature is of Anthropic's own models.
_IGNORED = frozenset({"cache_control", "citations", "caller", "signature", "toolset_name"})


class _Block(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    pass


class _Text(_Block, frozen=True, tag="text"):
    text: str


class _Base64(msgspec.Struct, frozen=True, tag="base64", tag_field="type"):
    data: str
    media_type: str = ""


class _Url(msgspec.Struct, frozen=True, tag="url", tag_field="type"):
    url: str


class _Image(_Block, frozen=True, tag="image"):
    source: _Base64 | _Url


class _Thinking(_Block, frozen=True, tag="thinking"):
    thinking: str


class _Redacted(_Block, frozen=True, tag="redacted_thinking"):
    """Thinking that another model's server sealed: it says nothing here."""

    data: str = ""


class _ToolUse(_Block, frozen=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class _ToolResult(_Block, frozen=True, tag="tool_result"):
    tool_use_id: str
    content: str | list[_Text] = ""
    is_error: bool = False


class _Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[_Text | _Image | _Thinking | _Redacted | _ToolUse | _ToolResult]


class _System(msgspec.Struct, frozen=True):
    system: str | list[_Text]


def parse_conversation(system: object, messages: object) -> tuple[Message, ...]:
    """The messages of a conversation, the system prompt first.

    Consecutive messages of one role are one, as in Anthropic's API.

    Raises:
        ApiError: a message is wrong. The error names its field.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages: expected a list of at least one message", param="messages")
    found: list[Message] = []
    if system is not None:
        text = convert({"system": _without_ignored(system)}, _System).system
        if text := _joined(text):
            found.append(Message("system", text))
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ApiError(f"{where} is not a JSON object", param=where)
        said = convert({**present(message), "content": _without_ignored(message.get("content"))}, _Said, where)
        for one in _messages(said, where):
            _add(found, one)
    return tuple(found)


def _without_ignored(content: object) -> object:
    """Blocks, and those in them, without fields that have no effect."""
    if not isinstance(content, list):
        return content
    return [
        {name: _without_ignored(value) for name, value in present(block).items() if name not in _IGNORED}
        if isinstance(block, dict)
        else block
        for block in content
    ]


def _messages(said: _Said, where: str) -> Iterator[Message]:
    """The messages of one of Anthropic's: results of tools are messages of their own."""
    if isinstance(said.content, str):
        yield Message(said.role, said.content)
    elif said.role == "assistant":
        yield _assistant(said.content, where)
    else:
        shown: list[_Text | _Image] = []
        for index, block in enumerate(said.content):
            if isinstance(block, _ToolResult):
                yield Message("tool", _joined(block.content), tool_call_id=block.tool_use_id)
            elif isinstance(block, _Text) or (isinstance(block, _Image) and said.role == "user"):
                shown.append(block)
            else:
                raise _misplaced(block, f"{where}.content[{index}]", said.role)
        if shown:
            yield _shown(said.role, shown, f"{where}.content")


def _shown(role: str, blocks: list[_Text | _Image], where: str) -> Message:
    """A message of texts, on lines of their own, and of images between them."""
    text = ""
    images: list[MessageImage] = []
    after_text = False
    for block in blocks:
        if isinstance(block, _Text):
            text += ("\n" if after_text else "") + block.text
            after_text = True
        else:
            images.append(_image(block, len(text), where))
            after_text = False
    return Message(role, text, images=tuple(images) if images else msgspec.UNSET)


def _image(block: _Image, at: int, where: str) -> MessageImage:
    if isinstance(block.source, _Url):
        return parse_image_url(block.source.url, at, f"{where}.source.url")
    return MessageImage(at=at, data=image_data(block.source.data, f"{where}.source.data"))


def _assistant(blocks: list[Any], where: str) -> Message:
    calls: list[ToolCall] = []
    text = thought = ""
    for index, block in enumerate(blocks):
        match block:
            case _Text():
                text += block.text
            case _Thinking():
                thought += block.thinking
            case _ToolUse():
                arguments = json.dumps(block.input, ensure_ascii=False)
                calls.append(ToolCall(id=block.id, name=block.name, arguments=arguments))
            case _ToolResult() | _Image():
                raise _misplaced(block, f"{where}.content[{index}]", "assistant")
    return Message(
        "assistant",
        text,
        tool_calls=tuple(calls) if calls else msgspec.UNSET,
        reasoning=thought or msgspec.UNSET,
    )


def _misplaced(block: msgspec.Struct, where: str, role: str) -> ApiError:
    kind = block.__struct_config__.tag
    return ApiError(f"{where}.type: a message of the {role} has no {kind}", param=f"{where}.type")


def _joined(content: str | list[_Text]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _add(found: list[Message], message: Message) -> None:
    """Adds a message, to the one before it if that has the same role and both are text alone."""
    if found and (last := found[-1]).role == message.role != "tool" and _text_alone(last) and _text_alone(message):
        found[-1] = Message(last.role, f"{last.content}\n{message.content}")
    else:
        found.append(message)


def _text_alone(message: Message) -> bool:
    return message == Message(message.role, message.content)
