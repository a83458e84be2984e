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
