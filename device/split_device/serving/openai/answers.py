"""Answers in OpenAI's formats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from split_device.generation.tools import ToolCall, ToolCallDelta, joined_calls
from split_device.serving.choices import Choice, TokenLogprobs
from split_device.serving.openai.query import CompletionKind
from split_device.serving.openai.usage import Usage

#: By kind: the prefix of a response's id, and its `object`.
NAMES: dict[CompletionKind, tuple[str, str]] = {
    "chat": ("chatcmpl", "chat.completion"),
    "text": ("cmpl", "text_completion"),
}

#: By kind: the `object` of a streamed chunk.
CHUNKS: dict[CompletionKind, str] = {"chat": "chat.completion.chunk", "text": "text_completion"}


@dataclass(frozen=True)
class Header:
    """What an answer, and each chunk of a streamed one, begins with. `created` is in seconds since the epoch."""

    kind: CompletionKind
    request_id: str
    created: int
    model: str

    def fields(self, object_: str) -> dict[str, Any]:
        id_ = f"{NAMES[self.kind][0]}-{self.request_id}"
        return {"id": id_, "object": object_, "created": self.created, "model": self.model}


def chat_choice(index: int, choice: Choice) -> dict[str, Any]:
    """A whole choice of a chat."""
    message = assistant_message(choice.text, choice.reasoning, choice.tool_calls) | {"refusal": None}
    return _choice(index, {"message": message}, choice)


def chat_piece(index: int, piece: Choice, first: bool) -> dict[str, Any]:
    """A piece of a streamed choice of a chat. The first one names the role, and is never empty beside it."""
    delta = _delta(piece)
    if first:
        delta = {"role": "assistant"} | (delta or {"content": ""})
    return _choice(index, {"delta": delta}, piece)


def chunk(header: Header, choice: dict[str, Any]) -> dict[str, Any]:
    """A chunk of a streamed response."""
    return header.fields(CHUNKS[header.kind]) | {"choices": [choice]}


def usage_chunk(header: Header, usage: Usage) -> dict[str, Any]:
    """The last chunk of a stream with `include_usage`."""
    return header.fields(CHUNKS[header.kind]) | {"choices": [], "usage": usage.fields()}


def assistant_message(text: str, reasoning: str, deltas: Iterable[ToolCallDelta]) -> dict[str, Any]:
    """A whole answer as a message, which can be part of the next prompt."""
    calls = joined_calls(deltas)
    made = [{"id": call.id, "type": "function", "function": _function(call)} for call in calls]
    return {
        "role": "assistant",
        "content": text or (None if calls else ""),
        **_reasoning(reasoning),
        **({"tool_calls": made} if made else {}),
    }


def _delta(piece: Choice) -> dict[str, Any]:
    """What a piece adds to the message: nothing, if it only says that the answer has ended."""
    calls = [
        {"index": delta.index, "id": delta.id, "type": "function", "function": _function(delta)}
        if delta.id
        else {"index": delta.index, "function": {"arguments": delta.arguments}}
        for delta in piece.tool_calls
    ]
    return {
        **_reasoning(piece.reasoning),
        **({"content": piece.text} if piece.text else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _reasoning(text: str) -> dict[str, str]:
    """What the model thought, by both names that vLLM has had for it."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _function(call: ToolCall | ToolCallDelta) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}


def _choice(index: int, content: dict[str, Any], choice: Choice) -> dict[str, Any]:
    logprobs = _logprobs(choice.logprobs)
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _logprobs(tokens: list[TokenLogprobs] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    content = [_token(token) | {"top_logprobs": [_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprobs) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}
