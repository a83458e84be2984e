"""Answers in OpenAI's formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from split_device.serving.choices import Choice, TokenLogprobs
from split_device.serving.openai.requests import CompletionKind

#: By kind: the prefix of a response's id, and its `object`.
NAMES: dict[CompletionKind, tuple[str, str]] = {
    "chat": ("chatcmpl", "chat.completion"),
    "text": ("cmpl", "text_completion"),
}

#: By kind: the `object` of a streamed chunk.
CHUNKS: dict[CompletionKind, str] = {"chat": "chat.completion.chunk", "text": "text_completion"}


def completion(
    kind: CompletionKind, id_: str, created: int, model: str, prompt_tokens: int, choices: Sequence[Choice]
) -> dict[str, Any]:
    """A whole response."""
    prefix, name = NAMES[kind]
    return {
        "id": f"{prefix}-{id_}",
        "object": name,
        "created": created,
        "model": model,
        "choices": [_choice(kind, index, choice) for index, choice in enumerate(choices)],
        "usage": usage(prompt_tokens, sum(choice.tokens for choice in choices)),
    }


def chunk(
    kind: CompletionKind, id_: str, created: int, model: str, index: int, piece: Choice, first: bool
) -> dict[str, Any]:
    """A chunk of a streamed response. The first one of a chat names the role."""
    content: dict[str, Any] = {"text": piece.text}
    if kind == "chat":
        content = {"delta": ({"role": "assistant"} if first else {}) | {"content": piece.text}}
    choice = {
        "index": index,
        **content,
        "logprobs": _logprobs(kind, piece.logprobs),
        "finish_reason": piece.finish_reason,
    }
    return _chunk(kind, id_, created, model) | {"choices": [choice]}


def usage_chunk(
    kind: CompletionKind, id_: str, created: int, model: str, prompt_tokens: int, tokens: int
) -> dict[str, Any]:
    """The last chunk of a stream with `include_usage`."""
    return _chunk(kind, id_, created, model) | {"choices": [], "usage": usage(prompt_tokens, tokens)}


def _chunk(kind: CompletionKind, id_: str, created: int, model: str) -> dict[str, Any]:
    return {"id": f"{NAMES[kind][0]}-{id_}", "object": CHUNKS[kind], "created": created, "model": model}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _choice(kind: CompletionKind, index: int, choice: Choice) -> dict[str, Any]:
    content: dict[str, Any] = {"text": choice.text}
    if kind == "chat":
        content = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
    logprobs = _logprobs(kind, choice.logprobs)
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}


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
