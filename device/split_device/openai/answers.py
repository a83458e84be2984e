"""Answers in OpenAI's formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from split_device.openai.requests import Kind

#: By kind: the prefix of an answer's id, and its type.
NAMES: dict[Kind, tuple[str, str]] = {"chat": ("chatcmpl", "chat.completion"), "text": ("cmpl", "text_completion")}


@dataclass(frozen=True)
class Choice:
    """One of the answers to a request."""

    text: str
    tokens: int
    finish_reason: str


def completion(
    kind: Kind, id_: str, created: int, model: str, prompt_tokens: int, choices: Sequence[Choice]
) -> dict[str, Any]:
    """A whole answer."""
    prefix, name = NAMES[kind]
    return {
        "id": f"{prefix}-{id_}",
        "object": name,
        "created": created,
        "model": model,
        "choices": [_choice(kind, index, choice) for index, choice in enumerate(choices)],
        "usage": usage(prompt_tokens, sum(choice.tokens for choice in choices)),
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _choice(kind: Kind, index: int, choice: Choice) -> dict[str, Any]:
    content: dict[str, Any] = {"text": choice.text}
    if kind == "chat":
        content = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
    return {"index": index, **content, "logprobs": None, "finish_reason": choice.finish_reason}
