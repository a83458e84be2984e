"""How many tokens a request took, as OpenAI's formats say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Tokens of all prompts and choices of a request.

    Args:
        cached: how many of the prompts' tokens were not computed again; None if that is not known.
        reasoning: how many of the choices' tokens are thinking; None if that is not known.
    """

    prompt: int
    completion: int
    cached: int | None = None
    reasoning: int | None = None

    def fields(self) -> dict[str, Any]:
        counts: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }
        if self.cached is not None:
            counts["prompt_tokens_details"] = {"cached_tokens": self.cached}
        if self.reasoning is not None:
            counts["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return counts
