"""Head or tail of a model: runs the steps of many requests together."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from split_common.engine.runner import Runner
from split_common.engine.scheduler import Scheduler, is_prefill
from split_common.engine.sequences import KVSequence, TokenRun
from split_common.engine.steps import ScheduledStep
from split_common.engine.trees import depths
from split_common.errors import Busy
from split_device.generation.placing import Placement

log = logging.getLogger(__name__)

#: A key, and the outcome of its step: the last layer's output `[tokens, width]`, or an error.
KeyedOutcome = tuple[Any, torch.Tensor | Exception]

Step = ScheduledStep[TokenRun[Any], TokenRun[Any]]


class StepTraits(Protocol):
    """What head and tail have to know of a step."""

    @property
    def adapter(self) -> int | None:
        """The number of the sequence's adapter; None without one."""

    @property
    def placement(self) -> Placement | None:
        """Where its tokens are; None if their positions are their indices."""

    @property
    def parents(self) -> Sequence[int]:
        """The token of the step that each one follows, -1 for the one before it; empty for a chain."""


@dataclass(eq=False)
class Stage:
    """One end of the model, and the steps that wait for it. Without layers, states pass unchanged.

    Not thread-safe. Each request has a key.
    """

    runner: Runner | None
    scheduler: Scheduler[TokenRun[Any], TokenRun[Any]] = field(init=False)
    #: Memory that is not reserved for a request, in units of the store.
    unreserved: int = 0
    #: Frees memory that no request holds, if there is any; returns whether there was.
    reclaim: Callable[[], bool] = lambda: False
    #: Steps that pass an end without layers.
    _passing: list[KeyedOutcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.runner is not None:
            self.scheduler = Scheduler(self.runner.store, divisible=self.runner.divisible)
            self.unreserved = self.runner.store.free

    @property
    def idle(self) -> bool:
        return self.runner is None or self.scheduler.idle

    def busy(self) -> set[Any]:
        """Keys that have a step here."""
        return self.scheduler.busy_sessions() if self.runner is not None else set()

    def cost(self, tokens: int) -> int:
        """Memory that a sequence of this many tokens takes."""
        return self.runner.store.new_sequence().cost(tokens) if self.runner is not None else 0

    def new_sequence(self) -> KVSequence | None:
        """An empty sequence; None for an end without layers."""
        return self.runner.store.new_sequence() if self.runner is not None else None

    @property
    def free(self) -> float:
        """Free memory, reserved or not, in units of the store; infinite for an end without layers."""
        return self.runner.store.free if self.runner is not None else math.inf

    def keep(self, sequence: KVSequence, begin: int, kept: Sequence[int]) -> None:
        """Drops tokens of a sequence, see `KVSequence.keep`. Frees memory for that if it has to."""
        while sequence.cost_after(begin, kept, 0) > self.free and self.reclaim():
            pass
        sequence.keep(begin, kept)

    def cancel(self, key: Hashable) -> None:
        """Drops a key's steps."""
        if self.runner is not None:
            self.scheduler.cancel(key)

    def add(
        self,
        key: Hashable,
        sequence: KVSequence | None,
        begin: int,
        states: torch.Tensor,
        traits: StepTraits | None = None,
    ) -> None:
        """Adds a step. The steps of one key run in order.

        Args:
            sequence: the keys and values that the step extends; None for an end without layers.
            begin: the index of the first token.
            states: `[tokens, width]`.
            traits: of the step; None for a chain without adapter whose positions are its tokens' indices.
        """
        if self.runner is None:
            self._passing.append((key, states))
            return
        assert sequence is not None
        adapter, placement, parents = (
            (traits.adapter, traits.placement, traits.parents) if traits is not None else (None, None, ())
        )
        places: Sequence[int]
        places = [begin + depth for depth in depths(parents)] if parents else range(begin, begin + len(states))
        run = TokenRun(sequence, states, places, adapter, parents=parents)
        if placement is not None:
            run = placement.run(run, self.runner.layers.split.body)
        prefill = not parents and is_prefill(len(states))
        self._start(self.scheduler.add(ScheduledStep(key, key, prefill, run)))

    def forward(self) -> tuple[int, list[KeyedOutcome]]:
        """Runs one forward over the steps that are ready, as far as they fit.

        Returns:
            The number of rows in the forward, 0 if no step was ready or it failed; and the outcomes of the steps
            that are complete.
        """
        if self.runner is None:
            passed, self._passing = self._passing, []
            return 0, passed
        outcomes: list[KeyedOutcome] = []
        chunks, starved = self.scheduler.next_batch()
        while starved is not None:
            if self.reclaim():
                chunks, starved = self.scheduler.next_batch()
                continue
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

    def run(self, name: str, counters: Counter[str], is_urgent: Callable[[Any], bool]) -> Iterator[KeyedOutcome]:
        """Runs one forward, or several until the steps of urgent keys are complete.

        Args:
            name: of this end, by which forwards and their rows are counted.

        Yields:
            The outcome of each step that is complete.
        """
        while True:
            rows, outcomes = self.forward()
            yield from outcomes
            if not rows:
                return
            counters.update({f"{name}_forwards": 1, f"{name}_rows": rows})
            if not any(map(is_urgent, self.busy())):
                return

    def _start(self, step: Step | None) -> None:
        if step is not None:
            self.scheduler.start(step, [step.request])

    def _end(self, step: Step) -> None:
        self._start(self.scheduler.end(step))
