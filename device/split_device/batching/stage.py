"""Head or tail of a model, through which the rows of many requests go together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from split_common.engine.rows import Row, Run, Store
from split_common.engine.runner import Runner
from split_common.engine.scheduler import Job, Scheduler

log = logging.getLogger(__name__)


class Ended(Exception):
    """The request of a step that is under way has ended: its outcome is not used."""


@dataclass(eq=False)
class Stage:
    """One end of the model and what waits for it; without layers, states pass at once."""

    runner: Runner | None
    scheduler: Scheduler = field(init=False)
    #: Memory that no request has been promised, in units of the store.
    room: int = 0

    def __post_init__(self) -> None:
        if self.runner is not None:
            self.scheduler = Scheduler(self.runner.store, divisible=not self.runner.positions_interact)
            self.room = self.runner.store.free

    @property
    def idle(self) -> bool:
        return self.runner is None or self.scheduler.idle

    def busy(self) -> set[Any]:
        """The keys of the steps that it holds."""
        return self.scheduler.busy_sessions() if self.runner is not None else set()

    def cost(self, tokens: int) -> int:
        """What a row of `tokens` tokens takes, in units of the store."""
        store: Store | None = self.runner.store if self.runner is not None else None
        return store.cost(store.new_row(), tokens) if store is not None else 0

    def add(
        self, key: Hashable, row: Row | None, begin: int, states: torch.Tensor, finish: Callable[[Any], None]
    ) -> None:
        """Hands `finish` the output, or an error, when a forward has made it; steps of a key run in order."""
        if self.runner is None:
            finish(states)
            return
        assert row is not None
        run = Run(row, states, range(begin, begin + len(states)))
        self.scheduler.add(Job(key, key, len(states), lambda: [run], finish))

    def forward(self) -> int:
        """Runs what is ready and fits into one forward; returns how many rows that were."""
        batch = self.scheduler.next_batch() if self.runner is not None else []
        if not batch or self.runner is None:
            return 0
        began = time.perf_counter()
        try:
            outputs = self.runner.run([piece.run for piece in batch])
        except Exception as error:
            log.error("a forward failed: %s", type(error).__name__)
            for piece in batch:
                self.scheduler.fail(piece.job, error)
            return 0
        self.scheduler.finish(batch, outputs, time.perf_counter() - began)
        return len(batch)
