"""Requests for text completions."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from split_device.generation.settings import Sampling
from split_device.jobs.job import ModelChoice, Task
from split_device.serving.fields import convert
from split_device.serving.openai.bodies import Body, choices, fields_of
from split_device.serving.openai.query import CompletionQuery

#: `max_tokens` of a text completion without a limit, as in OpenAI's API.
DEFAULT_TOKENS = 16


class TextBody(Body, frozen=True, kw_only=True):
    """A request's body."""

    prompt: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=1)]
    )
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None


def parse_text(body: object, model: ModelChoice, defaults: Sampling) -> CompletionQuery:
    """Parses a body into tasks. Arguments and errors are those of `requests.parse`."""
    text = convert(fields_of(body), TextBody)
    task = Task(
        model=model,
        prompt=text.prompt if isinstance(text.prompt, str) else text.prompt[0],
        sampling=text.sampling(text.max_tokens or DEFAULT_TOKENS, defaults),
        stop=text.stop_texts(),
    )
    tasks = choices(task, text.n or 1)
    return CompletionQuery(
        kind="text",
        model=text.model,
        tasks=tasks,
        per_prompt=len(tasks),
        stream=bool(text.stream),
        include_usage=text.include_usage(),
        logprobs=text.logprobs,
    )
