"""Measures how long each stage of a step takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from split_common.protocol import payloads
from split_device.sessions.requests import Reply

#: The stages of a step, in order. `queue` is the rest of a call: the way through the broker and back, and waiting
#: at the worker.
STAGES = ("head", "encode", "encrypt", "queue", "body", "worker", "decrypt", "decode", "tail", "sampling")


class StepTimings:
    """Seconds that one step spends in each stage. It travels with the step. Not thread-safe.

    Args:
        since: when the first lap began, by `time.perf_counter`; None for now.
    """

    def __init__(self, since: float | None = None) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        #: When the lap under way began, by `time.perf_counter`.
        self.since = time.perf_counter() if since is None else since

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] += seconds

    def start_lap(self) -> None:
        """The next lap begins now."""
        self.since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a lap, counts it to this stage, and begins the next lap."""
        began, self.since = self.since, time.perf_counter()
        self.add(stage, self.since - began)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Times a block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began)

    @contextmanager
    def measure_rest(self, stage: str) -> Iterator[None]:
        """Times a block without the seconds that are added to other stages meanwhile."""
        accounted = sum(self.seconds.values())
        began = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - began
            self.add(stage, max(0.0, passed - (sum(self.seconds.values()) - accounted)))


class Timings:
    """Sums the timings of complete steps since the last `reset`. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self._seconds = dict.fromkeys(STAGES, 0.0)
            self._steps = 0

    def record(self, step: StepTimings) -> None:
        """Adds a complete step."""
        with self._lock:
            self._steps += 1
            for stage, seconds in step.seconds.items():
                self._seconds[stage] += seconds

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Times a block that works on one step, or on several at once."""
        began = time.perf_counter()
        yield
        with self._lock:
            self._seconds[stage] += time.perf_counter() - began

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage."""
        with self._lock:
            return dict(self._seconds)

    @property
    def steps(self) -> int:
        """Calls of the body."""
        with self._lock:
            return self._steps

    def per_step_ms(self) -> dict[str, float]:
        """Mean milliseconds of each stage in one call of the body."""
        with self._lock:
            return {stage: 1000 * total / max(1, self._steps) for stage, total in self._seconds.items()}


def timed(timings: StepTimings, exchange: Callable[[], list[Reply]]) -> list[Reply]:
    """Counts where the time of an exchange with a worker goes. Returns its replies."""
    with timings.measure_rest("queue"):
        replies = exchange()
        for reply, _ in replies:
            if isinstance(reply, payloads.Result):
                timings.add("body", reply.body_us / 1e6)
                timings.add("worker", reply.worker_us / 1e6)
    return replies
