"""Whether a request sends steps ahead, and what they hold: drafts behind those that are away already."""

from __future__ import annotations

from collections.abc import Sequence

from split_common.engine.scheduler import DECODE_TOKENS
from split_device.generation.active import ActiveRequest
from split_device.generation.flights import Legs
from split_device.models.flight import TripTimes

#: Seconds of a trip below which none is: on one machine, they would only compete for its processors.
LEAST_TRIP = 0.01

#: The chance that all tokens of a step are right, below which none is sent behind it.
LEAST_CHANCE = 0.2


def steps_that_are_free(times: TripTimes, most: int) -> int:
    """How many steps may be sent ahead so that the worker has done with them before the right one comes.

    If they are void, the step that puts things right comes a trip after the answer to the first one. So they cost
    time that the worker would have been idle, and bytes.

    Args:
        times: those of the session.
        most: the answer is no more than this.
    """
    if times.trip < LEAST_TRIP:
        return 0
    return int(min(most, times.trip / max(times.worker, 1e-3)))


def draft_ahead(request: ActiveRequest, begun: int, most: int) -> list[list[int]]:
    """The tokens of further steps, behind the step that is made now and those that are away.

    Args:
        request: with the draft of that step.
        begun: number of tokens that it has beside its draft.
        most: steps at most that may be away behind the first one.
    """
    speculation, session = request.speculation, request.session
    if most <= 0 or speculation is None or speculation.branches or not session.can_fly:
        return []
    if begun + len(request.drafts) < DECODE_TOKENS:
        return []
    away = request.legs.steps[1:] if request.legs is not None else []
    count = steps_that_are_free(session.trip_times, most) - len(away)
    if count <= 0 or any(len(step) < DECODE_TOKENS for step in away):
        return []
    if speculation.chance(len(request.drafts)) < LEAST_CHANCE:
        return []
    known = [*request.drafts, *(token for step in away for token in step)]
    # One token more than the draft may be chosen.
    room = request.sampler.remaining(request.generation.tokens) - 1 - len(known)
    draft = speculation.ahead(known, min(room, count * DECODE_TOKENS))
    return [draft[at : at + DECODE_TOKENS] for at in range(0, len(draft), DECODE_TOKENS)]


def add_steps(request: ActiveRequest, steps: Sequence[list[int]]) -> None:
    """Makes steps of these tokens enter the head, the first one at the end of what is there."""
    request.pending += steps
    if request.legs is None:
        if len(steps) < 2:
            return
        request.legs = Legs()
    start = request.head_tokens
    for tokens in steps:
        request.legs.add(start, tokens, request.room)
        start += len(tokens)
