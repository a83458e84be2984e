"""Items of a conversation in the format of the Responses API: messages, calls of tools, and what was thought."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from split_device.generation.tools import ToolCall
from split_device.jobs.job import Message, MessageImage
from split_device.serving.fields import ApiError, convert, present
from split_device.serving.media import parse_image_url

#: The argument of the function that stands for a custom tool: a text of any form.
CUSTOM_INPUT = "input"

#: Fields of items and their parts that are accepted and have no effect.
_IGNORED = frozenset(
    {
        *("id", "status", "annotations", "logprobs", "phase", "encrypted_content", "caller"),
        *("prompt_cache_breakpoint", "cache_control"),
    }
)


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a text, or an image. Refusals of other models are what they said."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text", "input_image"]
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    #: Has no effect: the checkpoint's processor decides on an image's size.
    detail: Literal["auto", "low", "high", "original"] | None = None


class _Item(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    pass


class _Message(_Item, frozen=True, tag="message"):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[_Part]


class _FunctionCall(_Item, frozen=True, tag="function_call"):
    call_id: str
    name: str
    arguments: str
    namespace: str = ""


class _Output(_Item, frozen=True):
    call_id: str
    output: str | list[_Part]
    name: str | None = None
    namespace: str | None = None


class _FunctionOutput(_Output, frozen=True, tag="function_call_output"):
    pass


class _CustomCall(_Item, frozen=True, tag="custom_tool_call"):
    call_id: str
    name: str
    input: str
    namespace: str = ""


class _CustomOutput(_Output, frozen=True, tag="custom_tool_call_output"):
    pass


class _Reasoning(_Item, frozen=True, tag="reasoning"):
    summary: list[_Part] = []
    content: list[_Part] | None = None


_AnyItem = _Message | _FunctionCall | _FunctionOutput | _CustomCall | _CustomOutput | _Reasoning


class _Parsed(msgspec.Struct, frozen=True):
    input: _AnyItem


def as_items(given: object) -> list[Any]:
    """The `input` of a request as a list of items: a text is a message of the user. Raises ApiError."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    if not isinstance(given, list):
        raise ApiError("input: expected a text or a list of items", param="input")
    return [{"type": "message", **item} if isinstance(item, dict) else item for item in given]


def parse_items(items: Sequence[object], where: str = "input") -> list[Message]:
    """The messages that items come down to.

    A call belongs to the assistant's message before it, and what was thought to the message after it.

    Raises:
        ApiError: an item is wrong, or not supported. The error names its field.
    """
    found: list[Message] = []
    thought = ""
    for index, item in enumerate(items):
        at = f"{where}[{index}]"
        parsed = _parse(item, at)
        match parsed:
            case _Reasoning():
                thought += _text(parsed.content or parsed.summary, at)
                continue
            case _Output():
                found.append(Message("tool", _text(parsed.output, at), tool_call_id=parsed.call_id))
            case _FunctionCall():
                _add_call(found, _call(parsed, parsed.arguments), thought)
            case _CustomCall():
                arguments = json.dumps({CUSTOM_INPUT: parsed.input}, ensure_ascii=False)
                _add_call(found, _call(parsed, arguments), thought)
            case _Message():
                role = "system" if parsed.role == "developer" else parsed.role
                own = thought if role == "assistant" else ""
                text, images = _content(parsed.content, at)
                if images and role != "user":
                    raise _only_users(at)
                found.append(Message(role, text, reasoning=own or msgspec.UNSET, images=images))
        thought = ""
    return found


def _parse(item: object, where: str) -> _AnyItem:
    if not isinstance(item, dict):
        raise ApiError(f"{where} is not a JSON object", param=where)
    try:
        return convert({"input": _without_ignored(item)}, _Parsed).input
    except ApiError as error:
        path = where + (error.param or "input").removeprefix("input")
        message = str(error).removeprefix("input")
        code = "unsupported_parameter" if path.endswith(".type") else error.code
        raise ApiError(f"{where}{message}", param=path, code=code) from None


def _without_ignored(value: Any) -> Any:
    """An item or a part of one without fields that have no effect."""
    if isinstance(value, list):
        return [_without_ignored(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_ignored(each) for name, each in present(value).items() if name not in _IGNORED}


def _call(item: _FunctionCall | _CustomCall, arguments: str) -> ToolCall:
    return ToolCall(id=item.call_id, name=qualified(item.namespace, item.name), arguments=arguments)


def qualified(namespace: str, name: str) -> str:
    """The name by which the model knows a tool of a namespace."""
    return f"{namespace}__{name}" if namespace else name


def _add_call(found: list[Message], call: ToolCall, thought: str) -> None:
    """Adds a call to the assistant's message that is last, or to a new one."""
    last = found[-1] if found else None
    if last is None or last.role != "assistant" or thought:
        found.append(Message("assistant", "", tool_calls=(call,), reasoning=thought or msgspec.UNSET))
    else:
        found[-1] = msgspec.structs.replace(last, tool_calls=(*(last.tool_calls or ()), call))


def _text(content: str | Sequence[_Part], where: str) -> str:
    """The text of parts, of which none may be an image."""
    text, images = _content(content, where)
    if images:
        raise _only_users(where)
    return text


def _only_users(where: str) -> ApiError:
    return ApiError(f"{where}: only messages of the user have images", param=where, code="unsupported_parameter")


def _content(
    content: str | Sequence[_Part], where: str
) -> tuple[str, tuple[MessageImage, ...] | msgspec.UnsetType]:
    """The text of parts, on lines of their own, and the images between them."""
    if isinstance(content, str):
        return content, msgspec.UNSET
    text = ""
    images: list[MessageImage] = []
    after_text = False
    for index, part in enumerate(content):
        if part.type == "input_image":
            images.append(_image(part, len(text), f"{where}.content[{index}]"))
            after_text = False
        else:
            text += ("\n" if after_text else "") + (part.text or part.refusal or "")
            after_text = True
    return text, tuple(images) if images else msgspec.UNSET


def _image(part: _Part, at: int, where: str) -> MessageImage:
    if part.image_url is None:
        raise ApiError(
            f"{where}: images need an image_url here", param=f"{where}.image_url", code="unsupported_parameter"
        )
    return parse_image_url(part.image_url, at, f"{where}.image_url")
