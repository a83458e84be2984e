"""The two forms of a message's content for chat templates: a text, or parts, as of models that see images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def rendered(render: Callable[[Sequence[Mapping[str, Any]]], str], messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation of texts, in the form that a chat template reads.

    A template for parts alone leaves out a message that is a text, or fails at it.

    Args:
        render: renders a conversation by the template. It raises whatever the template raises.
    """
    asked = next((message["content"].strip() for message in reversed(messages) if message["role"] == "user"), "")
    try:
        text = render(messages)
    except Exception:
        other = _in_parts(render, messages, asked)
        if other is None:
            raise
        return other
    if asked in text:
        return text
    other = _in_parts(render, messages, asked)
    return text if other is None else other


def _in_parts(
    render: Callable[[Sequence[Mapping[str, Any]]], str], messages: Sequence[Mapping[str, Any]], asked: str
) -> str | None:
    """The conversation rendered as parts; None if that does not work either."""
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]
    try:
        text = render(parts)
    except Exception:
        return None
    return text if asked in text else None
