"""Requests for completions, parsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from split_device.serving.query import Query

CompletionKind = Literal["chat", "text"]


@dataclass(frozen=True)
class CompletionQuery(Query):
    """A request for chat or text completions."""

    kind: CompletionKind
    include_usage: bool
    #: How many choices of each prompt are answers; the likeliest, if it has more tasks.
    kept: int
    #: Whether choices begin with the prompt.
    echo: bool = False
    #: Whether they are the prompt alone.
    prompt_alone: bool = False
