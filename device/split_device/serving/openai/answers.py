"""Answers in OpenAI's formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from split_device.generation.tools import ToolCall, ToolCallDelta, joined_calls
from split_device.serving.choices import Choice, TokenLogprobs
from split_device.serving.openai.query import CompletionKind

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


def completion(header: Header, prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """A whole response."""
    return header.fields(NAMES[header.kind][1]) | {
        "choices": [_choice(header.kind, index, choice) for index, choice in enumerate(choices)],
        "usage": usage(prompt_tokens, sum(choice.tokens for choice in choices)),
    }


def chunk(header: Header, index: int, piece: Choice, first: bool) -> dict[str, Any]:
    """A chunk of a streamed response. The first one of a chat names the role."""
    content: dict[str, Any] = {"text": piece.text}
    if header.kind == "chat":
        content = {"delta": ({"role": "assistant"} if first else {}) | _delta(piece)}
    choice = {
        "index": index,
        **content,
        "logprobs": _logprobs(header.kind, piece.logprobs),
        "finish_reason": piece.finish_reason,
    }
    return header.fields(CHUNKS[header.kind]) | {"choices": [choice]}


def usage_chunk(header: Header, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    """The last chunk of a stream with `include_usage`."""
    return header.fields(CHUNKS[header.kind]) | {"choices": [], "usage": usage(prompt_tokens, tokens)}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _choice(kind: CompletionKind, index: int, choice: Choice) -> dict[str, Any]:
    content: dict[str, Any] = {"text": choice.text}
    if kind == "chat":
        content = {"message": _message(choice)}
    logprobs = _logprobs(kind, choice.logprobs)
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _message(choice: Choice) -> dict[str, Any]:
    calls = joined_calls(choice.tool_calls)
    made = [{"id": call.id, "type": "function", "function": _function(call)} for call in calls]
    return {
        "role": "assistant",
        "content": choice.text or (None if calls else ""),
        "refusal": None,
        **_reasoning(choice.reasoning),
        **({"tool_calls": made} if made else {}),
    }


def _delta(piece: Choice) -> dict[str, Any]:
    """What a piece adds to the message. A piece without anything has an empty content."""
    calls = [
        {"index": delta.index, "id": delta.id, "type": "function", "function": _function(delta)}
        if delta.id
        else {"index": delta.index, "function": {"arguments": delta.arguments}}
        for delta in piece.tool_calls
    ]
    return {
        **_reasoning(piece.reasoning),
        **({"content": piece.text} if piece.text or not (calls or piece.reasoning) else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _reasoning(text: str) -> dict[str, str]:
    """What the model thought, by both names that vLLM has had for it."""
    return {"reasoning_content": text, "reasoning": text} if text else {}


def _function(call: ToolCall | ToolCallDelta) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}


def _logprobs(kind: CompletionKind, tokens: list[TokenLogprobs] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    if kind == "chat":
        content = [_token(token) | {"top_logprobs": [_token(other) for other in token.top]} for token in tokens]
        return {"content": content, "refusal": None}
    return {
        "tokens": [_name(token) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_name(token.top) for token in tokens],
    }


def _by_name(tokens: Sequence[TokenLogprobs]) -> dict[str, float]:
    """Log probabilities in descending order, by name; of tokens with one name, that of the likeliest."""
    named: dict[str, float] = {}
    for token in tokens:
        named.setdefault(_name(token), token.logprob)
    return named


def _token(token: TokenLogprobs) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}


def _name(token: TokenLogprobs) -> str:
    """A token's text; for a part of a character its bytes, as in `bytes:\\xe4\\xbd`."""
    try:
        token.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)
    return token.text
