"""Head or tail of a model, through which the rows of many requests go together."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from split_common.engine.runner import Runner
from split_common.engine.scheduler import ScheduledStep, Scheduler, is_prefill
from split_common.engine.sequences import KVSequence, TokenRun
from split_common.errors import Busy

log = logging.getLogger(__name__)

#: What became of a request's step: its key, and the last layer's output `[tokens, width]` or the error.
Outcome = tuple[Any, torch.Tensor | Exception]

Step = ScheduledStep[TokenRun[Any], TokenRun[Any]]


@dataclass(eq=False)
class Stage:
    """One end of the model, and what waits for it; without layers, states pass unchanged. One thread uses it."""

    runner: Runner | None
    scheduler: Scheduler[TokenRun[Any], TokenRun[Any]] = field(init=False)
    #: Memory that no request has been promised, in units of the store.
    room: int = 0
    #: States that pass an end without layers, with their keys.
    _passing: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.runner is not None:
            self.scheduler = Scheduler(self.runner.store, divisible=not self.runner.positions_interact)
            self.room = self.runner.store.free

    @property
    def idle(self) -> bool:
        return self.runner is None or self.scheduler.idle

    def busy(self) -> set[Any]:
        """Keys that have a step in it."""
        return self.scheduler.busy_sessions() if self.runner is not None else set()

    def cost(self, tokens: int) -> int:
        """Memory that a sequence of this many tokens takes."""
        return self.runner.store.new_sequence().cost(tokens) if self.runner is not None else 0

    def add(self, key: Hashable, sequence: KVSequence | None, begin: int, states: torch.Tensor) -> None:
        """Takes a step of a request: states `[tokens, width]` from position `begin` on. A key's steps run in order.

        Args:
            sequence: the request's; None for an end without layers.
        """
        if self.runner is None:
            self._passing.append((key, states))
            return
        assert sequence is not None
        run = TokenRun(sequence, states, range(begin, begin + len(states)))
        self._start(self.scheduler.add(ScheduledStep(key, key, is_prefill(len(states)), run)))

    def forward(self) -> tuple[int, list[Outcome]]:
        """Runs what is ready and fits into one forward.

        Returns:
            The rows in it, 0 if nothing was ready or it failed; and what became of the steps that are over with it.
        """
        if self.runner is None:
            passed, self._passing = self._passing, []
            return 0, passed
        outcomes: list[Outcome] = []
        chunks, starved = self.scheduler.next_batch()
        while starved is not None:
            outcomes.append((starved.session, Busy("the KV memory of head and tail is full")))
            self._end(starved)
            chunks, starved = self.scheduler.next_batch()
        if not chunks:
            return 0, outcomes
        began = time.perf_counter()
        try:
            outputs = self.runner.run([chunk.run for chunk in chunks])
        except Exception as error:
            log.error("a forward failed: %s", type(error).__name__)
            for chunk in chunks:
                outcomes.append((chunk.step.session, error))
                self._end(chunk.step)
            return 0, outcomes
        for step in self.scheduler.finish(chunks, outputs, time.perf_counter() - began):
            outcomes.append((step.session, step.output()))
            self._end(step)
        return len(chunks), outcomes

    def _start(self, step: Step | None) -> None:
        if step is not None:
            self.scheduler.start(step, [step.request])

    def _end(self, step: Step) -> None:
        self._start(self.scheduler.end(step))
