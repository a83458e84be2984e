"""Responses, and the events of one that is streamed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from split_common.errors import ConfigError
from split_common.system.text import parse_json
from split_device.serving.choices import TokenLogprobs
from split_device.serving.fields import ApiError
from split_device.serving.openai.responses.items import CUSTOM_INPUT
from split_device.serving.openai.responses.tools import ToolNames
from split_device.serving.parts import Part, PartEvent, Parts

#: Prefixes of the ids of items, by the kind of the part.
_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


@dataclass(frozen=True)
class ResponseWriter:
    """Writes one response, whole or as events.

    Args:
        unique: what is part of all ids in the response.
        created: when the response began, in seconds since the epoch.
        echoed: fields of the request that the response repeats.
        names: what is to be known of the tools.
    """

    unique: str
    created: int
    echoed: dict[str, Any]
    names: ToolNames
    prompt_tokens: int
    #: How many tokens of the prompt were not computed again.
    cached: Callable[[], int] = lambda: 0

    @property
    def id(self) -> str:
        return response_id(self.unique)

    def response(self, parts: Parts, error: ApiError | None = None) -> dict[str, Any]:
        """The response with the parts so far."""
        status = _status(parts, error)
        ended = status != "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None if error is None else {"code": error.code or "server_error", "message": str(error)},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._output(parts, status) if ended else [],
            "usage": self._usage(parts) if ended else None,
            **self.echoed,
        }

    def _output(self, parts: Parts, status: str) -> list[dict[str, Any]]:
        """The items of an answer that has ended. Only its last part may be cut off."""
        cut_off = parts.parts[-1] if parts.parts and status != "completed" else None
        return [self.item(part, "incomplete" if part is cut_off else "completed") for part in parts.parts]

    def _usage(self, parts: Parts) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached(), "cache_write_tokens": 0},
            "output_tokens": parts.tokens,
            "output_tokens_details": {"reasoning_tokens": parts.reasoning_tokens},
            "total_tokens": self.prompt_tokens + parts.tokens,
        }

    def item(self, part: Part, status: str) -> dict[str, Any]:
        """A part as an item. Thinking stands in the open, because the client holds the conversation."""
        ended = status != "in_progress"
        common = {"id": self.item_id(part), "status": status}
        if part.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": part.text}] if ended else []
            return {"type": "reasoning", **common, "summary": [], "content": content, "encrypted_content": None}
        if part.kind == "text":
            content = [_text_part(part)] if ended else []
            return {"type": "message", **common, "role": "assistant", "content": content}
        call = {**common, "call_id": part.call_id, "name": part.name}
        if part.name in self.names.namespaces:
            call["namespace"], call["name"] = self.names.namespaces[part.name]
        text = part.text if ended else ""
        if part.name in self.names.custom:
            return {"type": "custom_tool_call", **call, "input": _custom_input(text)}
        return {"type": "function_call", **call, "arguments": text}

    def item_id(self, part: Part) -> str:
        """The id of a part's item."""
        return f"{_PREFIXES[part.kind]}_{self.unique}_{part.index}"


class ResponseEvents:
    """The events of a streamed response, numbered from 0."""

    def __init__(self, writer: ResponseWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self._parts = Parts()

    def _event(self, type_: str, **fields: Any) -> dict[str, Any]:
        return {"type": type_, "sequence_number": next(self._numbers), **fields}

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first events."""
        for type_ in ("response.created", "response.in_progress"):
            yield self._event(type_, response=self._writer.response(self._parts))

    def part(self, happened: PartEvent) -> Iterator[dict[str, Any]]:
        """What happens to a part."""
        writer, part = self._writer, happened.part
        item_id = writer.item_id(part)
        at: dict[str, Any] = {"output_index": part.index}
        inner = {"item_id": item_id, **at}
        match happened.kind:
            case "begin":
                yield self._event("response.output_item.added", **at, item=writer.item(part, "in_progress"))
                if part.kind == "text":
                    empty = _text_part(Part("text", part.index))
                    yield self._event("response.content_part.added", **inner, content_index=0, part=empty)
            case "grow":
                yield from self._delta(happened, inner)
            case "end":
                yield from self._done(part, inner)
                status = "incomplete" if happened.cut_off else "completed"
                yield self._event("response.output_item.done", **at, item=writer.item(part, status))

    def _delta(self, happened: PartEvent, inner: dict[str, Any]) -> Iterator[dict[str, Any]]:
        match happened.part.kind:
            case "text":
                logprobs = [_logprob(token) for token in happened.logprobs]
                yield self._event(
                    "response.output_text.delta",
                    **inner,
                    content_index=0,
                    delta=happened.text,
                    logprobs=logprobs,
                )
            case "reasoning":
                yield self._event("response.reasoning_text.delta", **inner, content_index=0, delta=happened.text)
            case "call" if happened.part.name not in self._writer.names.custom:
                yield self._event("response.function_call_arguments.delta", **inner, delta=happened.text)

    def _done(self, part: Part, inner: dict[str, Any]) -> Iterator[dict[str, Any]]:
        match part.kind:
            case "text":
                whole = _text_part(part)
                yield self._event(
                    "response.output_text.done",
                    **inner,
                    content_index=0,
                    text=part.text,
                    logprobs=whole["logprobs"],
                )
                yield self._event("response.content_part.done", **inner, content_index=0, part=whole)
            case "reasoning":
                yield self._event("response.reasoning_text.done", **inner, content_index=0, text=part.text)
            case "call" if part.name in self._writer.names.custom:
                text = _custom_input(part.text)
                yield self._event("response.custom_tool_call_input.delta", **inner, delta=text)
                yield self._event("response.custom_tool_call_input.done", **inner, input=text)
            case "call":
                name = self._writer.item(part, "completed")["name"]
                done = "response.function_call_arguments.done"
                yield self._event(done, **inner, name=name, arguments=part.text)

    def end(self, response: dict[str, Any]) -> dict[str, Any]:
        """The last event, with the whole response."""
        return self._event(f"response.{response['status']}", response=response)


def response_id(unique: str) -> str:
    """The id of a response."""
    return f"resp_{unique}"


def _status(parts: Parts, error: ApiError | None) -> str:
    if error is not None:
        return "failed"
    if parts.finish_reason is None:
        return "in_progress"
    return "completed" if parts.finish_reason in ("stop", "tool_calls") else "incomplete"


def _text_part(part: Part) -> dict[str, Any]:
    logprobs = [_logprob(token) for token in part.logprobs]
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": logprobs}


def _logprob(token: TokenLogprobs) -> dict[str, Any]:
    return _named(token) | {"top_logprobs": [_named(other) for other in token.top]}


def _named(token: TokenLogprobs) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.data), "logprob": token.logprob}


def _custom_input(arguments: str) -> str:
    """The text for a custom tool; the arguments as they are if they are cut off."""
    try:
        found = parse_json(arguments.encode(), "the arguments")
    except ConfigError:
        return arguments
    text = found.get(CUSTOM_INPUT) if isinstance(found, dict) else None
    return text if isinstance(text, str) else arguments
