"""Tokens that a constraint leaves no choice about: they need no logits, and cost no trip to a worker."""

from __future__ import annotations

from collections import Counter

from split_device.generation.request import FinishReason, Generation, Logprobs
from split_device.generation.sampling import Sampler
from split_device.generation.turn_time import TurnTime

#: Most tokens that are forced in a row. Those behind them come in the next step, so that a grammar of one long text
#: holds up no other request.
MAX_FORCED = 64


def accept_token(
    sampler: Sampler, generation: Generation, turn: TurnTime, token: int, logprobs: Logprobs | None = None
) -> list[int]:
    """Adds a token to a text, and those that the constraint forces after it, as far as there is time.

    Returns:
        All of them. They go through the model together.

    Raises:
        Exception: what the generation's callback, or the constraint, raises.
    """
    sampler.accept(token)
    generation.add(token, logprobs, sampler.state)
    return [token, *_accept_forced(sampler, generation, turn)]


def accept_first(
    sampler: Sampler, generation: Generation, counters: Counter[str]
) -> FinishReason | Exception | None:
    """Adds the tokens that the constraint forces before the first choice, and counts them as `tokens`.

    Returns:
        Why the text is complete, or the error; None if it goes on.
    """
    if generation.request.prompt_logprobs is not None:
        # The prompt goes through the model alone.
        return None
    try:
        with TurnTime() as turn:
            counters["tokens"] += len(_accept_forced(sampler, generation, turn))
        return sampler.finish_reason(generation.tokens)
    except Exception as error:
        return error


def _accept_forced(sampler: Sampler, generation: Generation, turn: TurnTime) -> list[int]:
    """The tokens that the constraint forces now, which are then in the text: at most `MAX_FORCED`.

    When the time is over, the others come in later steps, like all tokens.
    """
    forced: list[int] = []
    while len(forced) < MAX_FORCED and not turn.over and sampler.finish_reason(generation.tokens) is None:
        if (token := sampler.take_forced()) is None:
            break
        sampler.accept(token)
        generation.add(token, None, sampler.state)
        forced.append(token)
    return forced
