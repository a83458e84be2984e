"""Requests for completions in OpenAI's formats, parsed into tasks."""

from __future__ import annotations

from split_device.generation.chat_template import ChatTemplate
from split_device.generation.settings import Sampling
from split_device.jobs.job import ModelChoice
from split_device.serving.openai.chat import parse_chat
from split_device.serving.openai.query import CompletionKind, CompletionQuery
from split_device.serving.openai.text import parse_text

#: The kinds of completion, by path.
COMPLETION_PATHS: dict[str, CompletionKind] = {"/v1/chat/completions": "chat", "/v1/completions": "text"}


def parse(
    kind: CompletionKind,
    body: object,
    model: ModelChoice,
    defaults: Sampling = Sampling(),
    template: ChatTemplate = ChatTemplate(),
) -> CompletionQuery:
    """Parses a body into tasks for `model`, whatever model the body names.

    Args:
        defaults: the temperature, top_p and top_k of bodies that name none; None for those of the checkpoint.
        template: how conversations become prompts; values of a body's own come before its values.

    Raises:
        ApiError: the body is not a valid request.
    """
    if kind == "chat":
        return parse_chat(body, model, defaults, template)
    return parse_text(body, model, defaults)
