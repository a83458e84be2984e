"""Where a token's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: The stages of a step, in their order. `queue` is all that is not accounted for elsewhere: the way through the
#: broker and back, and waiting at the worker.
STAGES = ("head", "encode", "encrypt", "queue", "body", "worker", "decrypt", "decode", "tail", "sampling")


@dataclass
class Timings:
    """Seconds spent in each stage since the last `reset`, over `steps` calls of the body."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    steps: int = 0

    def reset(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.steps = 0

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] += seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    @contextmanager
    def measure_rest(self, stage: str) -> Iterator[None]:
        """Times a block, less what is added to other stages meanwhile."""
        accounted = sum(self.seconds.values())
        began = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - began
            self.add(stage, max(0.0, passed - (sum(self.seconds.values()) - accounted)))

    def per_step_ms(self) -> dict[str, float]:
        """Mean milliseconds of each stage for a call of the body."""
        return {stage: 1000 * total / max(1, self.steps) for stage, total in self.seconds.items()}
