"""First tokens come first: which steps are delayed while requests wait for their first token."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping

import torch

from split_common.engine.scheduler import is_prefill
from split_device.generation.active import ActiveRequest

#: Prompt tokens that may be at workers at once, unless they are of one prompt: a later request of a higher priority
#: waits for no more than these.
MAX_PREFILL_AT_WORKERS = 1024

#: While prompts with more tokens than this wait for their first token, requests without priority do not decode. A
#: worker takes many prompts faster if no decoding runs beside them, and then they decode together.
MANY_PROMPT_TOKENS = 512

#: Longest delay of a step, in seconds; and how long steps are delayed for first tokens that do not come.
MAX_DELAY = 5.0

#: A request, and the states `[tokens, width]` of its step.
RequestStates = tuple[ActiveRequest, torch.Tensor]


def is_delayed(request: ActiveRequest, urgent: float, now: float) -> bool:
    """Whether a request's step waits in favour of requests of priority `urgent`."""
    return request.priority < urgent and now < request.ready_since + MAX_DELAY


class FirstTokens:
    """Decides which steps are delayed in favour of requests that wait for their first token. Not thread-safe.

    Times are those of `time.monotonic`.

    Args:
        active: the requests that run, as a view.
    """

    def __init__(self, active: Collection[ActiveRequest]) -> None:
        self._active = active
        #: Until when steps are delayed, if no further request begins or gets its first token.
        self._delay_until = 0.0

    def renew(self) -> None:
        """A request has begun, or got its first token: steps may be delayed for `MAX_DELAY` from now."""
        self._delay_until = time.monotonic() + MAX_DELAY

    def urgent(self, now: float) -> float:
        """The highest priority of requests that wait for their first token: steps of a lower one are delayed.

        Minus infinity if no step is.
        """
        waiting = [request.priority for request in self._active if request.awaits_first_token]
        return max(waiting) if waiting and now < self._delay_until else -math.inf

    def delay_ends(self, requests: Iterable[ActiveRequest]) -> list[float]:
        """When a delay of these requests' steps may end."""
        ends = [request.ready_since + MAX_DELAY for request in requests]
        return [self._delay_until, *ends] if ends else []

    def divide(
        self, outgoing: Iterable[RequestStates], at_workers: Mapping[ActiveRequest, int], now: float
    ) -> tuple[list[RequestStates], list[RequestStates]]:
        """Divides steps into those that go to workers now, the highest priority first, and those that wait.

        Args:
            outgoing: the steps, or parts of steps in their order.
            at_workers: the number of tokens that each request has at a worker.
        """
        urgent = self.urgent(now)
        prompt_tokens = sum(request.prompt_tokens for request in self._active if request.awaits_first_token)
        prompts_only = prompt_tokens > MANY_PROMPT_TOKENS and now < self._delay_until
        prefill = sum(tokens for tokens in at_workers.values() if is_prefill(tokens))
        sent: list[RequestStates] = []
        kept: list[RequestStates] = []
        # Requests of which a part goes or has gone, and those of which one waits.
        begun, waiting = {*at_workers}, set[ActiveRequest]()
        for request, states in sorted(outgoing, key=lambda each: -each[0].priority):
            tokens = len(states)
            is_full = prefill > 0 and prefill + tokens > MAX_PREFILL_AT_WORKERS
            crowded = is_prefill(tokens) and is_full and request not in begun
            stopped = prompts_only and request.priority <= 0 and not request.awaits_first_token
            delayed = is_delayed(request, math.inf if stopped else urgent, now)
            if crowded or delayed or request in waiting:
                waiting.add(request)
                kept.append((request, states))
            else:
                begun.add(request)
                prefill += tokens if is_prefill(tokens) else 0
                sent.append((request, states))
        return sent, kept
