"""A choice of an answer, and its pieces: what all dialects are written from."""

from __future__ import annotations

from dataclasses import dataclass

from split_device.generation.token_logprobs import TokenLogprobs as TokenLogprobs
from split_device.generation.tools import ToolCallDelta as ToolCallDelta


@dataclass(frozen=True)
class Choice:
    """One choice of a response, or a piece of it, whatever the dialect. `logprobs` is None if not requested."""

    text: str
    tokens: int
    #: "stop", "length", "cancelled" or "tool_calls"; None for a piece that others follow.
    finish_reason: str | None
    logprobs: list[TokenLogprobs] | None = None
    #: What the model thought before it answered.
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    #: The stop string that ended it, if one did.
    stop_text: str | None = None
    #: How many of the tokens are thinking; counted in the last piece alone.
    reasoning_tokens: int = 0
