"""The formats in which requests for texts come."""

from __future__ import annotations

from split_device.serving.anthropic.messages import Messages
from split_device.serving.openai.completions import Completions
from split_device.serving.openai.responses.endpoint import Responses
from split_device.serving.openai.responses.store import ResponseStore
from split_device.serving.server import Dialect
from split_device.serving.text_model import TextModel
from split_device.serving.tokens import Tokens


def dialects(model: TextModel | None, store: ResponseStore) -> list[Dialect]:
    """All formats, for a model; none without one.

    Args:
        store: where responses are kept.
    """
    return [] if model is None else [Completions(model), Responses(model, store), Messages(model), Tokens(model)]
