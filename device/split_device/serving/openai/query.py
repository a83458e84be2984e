"""Requests for completions, parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from split_device.serving.query import Query

CompletionKind = Literal["chat", "text"]

#: Which chunks of a stream count tokens.
UsageIn = Literal["none", "last", "all"]


class CompletionForm(msgspec.Struct, frozen=True, kw_only=True):
    """How the choices of a completion are written. Batches store it."""

    kind: CompletionKind
    #: How many tasks each prompt has.
    per_prompt: int
    #: How many choices of each prompt are answers; the likeliest, if it has more tasks.
    kept: int
    #: How many alternatives are told with each token; None for no log probabilities.
    logprobs: int | None = None
    #: The same for the prompts, in vLLM's form.
    prompt_logprobs: int | None = None
    #: Whether choices begin with the prompt.
    echo: bool = False
    #: Whether they are the prompt alone.
    prompt_alone: bool = False


@dataclass(frozen=True)
class CompletionQuery(Query):
    """A request for chat or text completions."""

    form: CompletionForm
    usage_in: UsageIn
