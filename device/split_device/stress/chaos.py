"""Faults: what they strike and when, drawn from a seed for each kind of fault."""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from split_device.stress.processes import Supervised
from split_device.stress.proxy import Proxy

#: Shortest and longest time between two faults of a kind, in seconds.
INTERVALS = {
    "kill": (8.0, 12.0),
    "stop": (14.0, 22.0),
    "broker": (50.0, 65.0),
    "lag": (9.0, 15.0),
    "drop": (7.0, 12.0),
    "corrupt": (9.0, 15.0),
}

#: Share of its interval after which the first fault of a kind comes, so that short runs have some too.
FIRST_SHARE = 0.2

#: How long a worker is stopped, in seconds: some resume before they count as dead, others after.
STOP_SECONDS = 0.5, 6.0

#: Delay of each chunk on a slow connection, and how long the connection stays slow, in seconds.
LAG_DELAY = 0.02, 0.25
LAG_SECONDS = 2.0, 5.0

#: How long a connection swallows everything before it is reset, in seconds.
BLACKHOLE_SECONDS = 1.0, 5.0

#: Delay before a fault that found nothing to strike tries again, in seconds.
RETRY_DELAY = 0.5


class Chaos:
    """Causes faults in its own thread, from `start` to `close`.

    A worker is killed or stopped only if another one runs, or if the fleet has only one. A restart takes a while,
    and a fleet in which no worker runs would test nothing.

    Args:
        kinds: of faults, from `INTERVALS`.
        seed: the same seed draws the same faults.
        workers: which to strike.
        queue: the broker or Redis server to strike; None if this run did not start it.
        proxy: strikes the connections; None if `kinds` has none of `NETWORK_FAULTS`.
    """

    def __init__(
        self,
        kinds: list[str],
        seed: int,
        workers: list[Supervised],
        queue: Supervised | None,
        proxy: Proxy | None,
    ) -> None:
        self._workers = workers
        self._queue = queue
        self._proxy = proxy
        self._faults: dict[str, Callable[[random.Random], str | None]] = {
            "kill": self._kill,
            "stop": self._stop,
            "broker": self._broker,
            "lag": self._lag,
            "drop": self._drop,
            "corrupt": self._corrupt,
        }
        self._rngs = {kind: random.Random(f"{seed} {kind}") for kind in kinds}
        self._ties = itertools.count()
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        # The time at which the current action was due. The next ones are scheduled from it, so that a thread that
        # wakes late does not change the order of the faults.
        self._now = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stress-chaos", daemon=True)
        #: Number of faults by kind; "drop" is counted as reset, truncation or blackhole.
        self.counts: Counter[str] = Counter()
        #: Time (`time.monotonic`) and kind of each fault, with the kinds of `INTERVALS`.
        self.history: list[tuple[float, str]] = []

    def start(self) -> None:
        self._now = time.monotonic()
        for kind, rng in self._rngs.items():
            self._schedule(FIRST_SHARE * rng.uniform(*INTERVALS[kind]), partial(self._strike, kind))
        self._thread.start()

    def close(self) -> None:
        """Ends the faults; resumes workers that are stopped."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        for worker in self._workers:
            worker.resume()

    def _run(self) -> None:
        while self._due and not self._closing.wait(max(0.0, self._due[0][0] - time.monotonic())):
            self._now, _, what = heapq.heappop(self._due)
            what()

    def _schedule(self, seconds: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._due, (self._now + seconds, next(self._ties), what))

    def _strike(self, kind: str) -> None:
        rng = self._rngs[kind]
        name = self._faults[kind](rng)
        if name is None:
            self._schedule(RETRY_DELAY, partial(self._strike, kind))
            return
        self.counts[name] += 1
        self.history.append((time.monotonic(), kind))
        self._schedule(rng.uniform(*INTERVALS[kind]), partial(self._strike, kind))

    # Each of these strikes, and returns the name for `counts`, or None if there was nothing to strike.

    def _kill(self, rng: random.Random) -> str | None:
        worker = self._victim(rng)
        if worker is None:
            return None
        worker.kill()
        return "kill"

    def _stop(self, rng: random.Random) -> str | None:
        worker = self._victim(rng)
        if worker is None:
            return None
        worker.stop()
        self._schedule(rng.uniform(*STOP_SECONDS), worker.resume)
        return "stop"

    def _victim(self, rng: random.Random) -> Supervised | None:
        running = [worker for worker in self._workers if worker.running]
        return rng.choice(running) if len(running) >= min(2, len(self._workers)) else None

    def _broker(self, _rng: random.Random) -> str | None:
        if self._queue is None or not self._queue.running:
            return None
        self._queue.kill()
        return "broker"

    def _lag(self, rng: random.Random) -> str | None:
        assert self._proxy is not None
        return "lag" if self._proxy.lag(rng, rng.uniform(*LAG_DELAY), rng.uniform(*LAG_SECONDS)) else None

    def _drop(self, rng: random.Random) -> str | None:
        assert self._proxy is not None
        kind = rng.choice(["reset", "truncation", "blackhole"])
        match kind:
            case "reset":
                struck = self._proxy.reset(rng)
            case "truncation":
                struck = self._proxy.truncate(rng)
            case _:
                struck = self._proxy.blackhole(rng, rng.uniform(*BLACKHOLE_SECONDS))
        return kind if struck else None

    def _corrupt(self, rng: random.Random) -> str | None:
        assert self._proxy is not None
        return "corruption" if self._proxy.corrupt(rng) else None
