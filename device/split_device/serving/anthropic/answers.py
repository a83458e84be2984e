"""Answers in Anthropic's format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from split_common.system.text import parse_json
from split_device.serving.parts import Part, PartEvent, Parts

#: Why an answer ended, by the generator's name of the reason.
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

#: The delta of a block, and its field, by the kind of the part.
_DELTAS = {"reasoning": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}


def message(id_: str, model: str, prompt_tokens: int, parts: Parts, cached: int = 0) -> dict[str, Any]:
    """A whole answer, or its beginning if it has no parts yet."""
    return {
        "id": f"msg_{id_}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [_block(part) for part in parts.parts],
        **_ending(parts),
        "usage": _input_usage(prompt_tokens, cached) | {"output_tokens": parts.tokens},
    }


def block_event(event: PartEvent) -> dict[str, Any]:
    """What happens to a part, as an event of its block."""
    part = event.part
    if event.kind == "begin":
        empty = Part(part.kind, part.index, call_id=part.call_id, name=part.name)
        return {"type": "content_block_start", "index": part.index, "content_block": _block(empty)}
    if event.kind == "end":
        return {"type": "content_block_stop", "index": part.index}
    delta = {"type": "input_json_delta", "partial_json": event.text}
    if part.kind != "call":
        type_, field = _DELTAS[part.kind]
        delta = {"type": type_, field: event.text}
    return {"type": "content_block_delta", "index": part.index, "delta": delta}


def end_events(prompt_tokens: int, parts: Parts, cached: int = 0) -> Iterator[dict[str, Any]]:
    """The last events of an answer."""
    usage = _input_usage(prompt_tokens, cached) | {"output_tokens": parts.tokens}
    yield {"type": "message_delta", "delta": _ending(parts), "usage": usage}
    yield {"type": "message_stop"}


def _ending(parts: Parts) -> dict[str, Any]:
    if parts.stop_text is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": parts.stop_text}
    reason = parts.finish_reason
    return {"stop_reason": reason and _STOP_REASONS.get(reason, "end_turn"), "stop_sequence": None}


def _input_usage(prompt_tokens: int, cached: int) -> dict[str, int]:
    """Tokens of the prompt; those that were cached are counted apart."""
    return {
        "input_tokens": prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
    }


def _block(part: Part) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": ""}
    if part.kind == "text":
        return {"type": "text", "text": part.text}
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": _arguments(part.text)}


def _arguments(text: str) -> Any:
    """A call's arguments as an object; an empty one for arguments that were cut off."""
    try:
        found = parse_json(text.encode(), "the arguments")
    except Exception:
        return {}
    return found if isinstance(found, dict) else {}
