"""A request that runs, and the thread that waits for its session."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from split_common.engine.sequences import KVSequence
from split_device.generation.request import Generation
from split_device.generation.sampling import Sampler
from split_device.models.cache import SessionCacheLayer, StepContext

#: The outcome of a step: states `[tokens, width]`, or an error.
Outcome = torch.Tensor | Exception


@dataclass(eq=False)
class ActiveRequest:
    """A request that has a sequence in head and tail, and a session.

    The generator's thread uses it. The session's thread takes from the outbox and calls the session.
    """

    generation: Generation
    sampler: Sampler
    session: SessionCacheLayer
    #: Its keys and values in head and tail; None for an end without layers.
    sequences: tuple[KVSequence | None, KVSequence | None]
    #: Memory that is reserved for it in head and tail, in units of their stores.
    costs: tuple[int, int]
    #: Tokens that have not entered the head yet; those of one list go through the model together.
    pending: deque[list[int]]
    #: Number of tokens in the first list of `pending`, when the request began.
    prompt_tokens: int
    awaits_first_token: bool = True
    #: Number of tokens that have entered the head, and the tail.
    head_tokens: int = 0
    tail_tokens: int = 0
    #: When its states became ready for a worker, or for the tail, by `time.monotonic`.
    ready_since: float = 0.0
    ended: bool = False
    #: States `[tokens, width]` for the worker; None ends the session's thread.
    outbox: queue.SimpleQueue[torch.Tensor | None] = field(default_factory=queue.SimpleQueue)

    @property
    def adapter(self) -> int | None:
        """The number of its adapter; None without one."""
        adapter = self.generation.adapter
        return None if adapter is None else adapter.number

    @property
    def priority(self) -> int:
        return self.generation.request.priority

    def session_loop(self, on_outcome: Callable[[ActiveRequest, Outcome], None]) -> None:
        """Runs the steps of the outbox on a worker until it holds None, then frees the session.

        Args:
            on_outcome: called on this thread after each step.
        """
        while (states := self.outbox.get()) is not None:
            outcome: Outcome
            try:
                with torch.inference_mode():
                    outcome = self.session.step(states[None], StepContext())[0]
            except Exception as error:
                outcome = error
            on_outcome(self, outcome)
        self.session.reset()
