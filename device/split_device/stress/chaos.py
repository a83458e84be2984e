"""Which fault strikes what and when: drawn from a seed, kind by kind."""

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

#: Least and most seconds between two faults of a kind.
INTERVALS = {
    "kill": (8.0, 12.0),
    "stop": (14.0, 22.0),
    "broker": (50.0, 65.0),
    "lag": (9.0, 15.0),
    "drop": (7.0, 12.0),
    "corrupt": (9.0, 15.0),
}

#: Kinds that only the proxy can bring about.
OF_THE_NETWORK = ("lag", "drop", "corrupt")

#: The first fault of a kind comes after this share of its interval, so that short runs have some too.
FIRST = 0.2

#: Seconds that a worker is stopped: some come back before they are missed, others as zombies.
STOPPED = 0.5, 6.0

#: Seconds that a chunk is held back, and for how long that goes on.
LAG = 0.02, 0.25
LAGGING = 2.0, 5.0

#: Seconds that a connection leads nowhere before it is reset.
DARK = 1.0, 5.0

#: Seconds before another attempt where a fault found nothing to strike.
POSTPONED = 0.5


class Chaos:
    """Strikes in a thread of its own, from `start` to `close`.

    A worker is killed or stopped only where another one runs, or where there is but one at all: a restart takes a
    while, and a fleet that never runs proves nothing.

    Args:
        kinds: of `INTERVALS`.
        seed: the same seed draws the same faults.
        workers, queue: what to strike; `queue` is the broker or the Redis server, None if it is not ours.
        proxy: strikes the connections; None where none of `OF_THE_NETWORK` is wanted.
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
        # When what is done just now was due: what follows is counted from then, so that a thread that wakes late
        # changes nothing in the order of the faults.
        self._now = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stress-chaos", daemon=True)
        #: Faults that struck, by kind; those of the kind "drop" by what they are.
        self.counts: Counter[str] = Counter()
        #: When, by `time.monotonic`, and of which kind of `INTERVALS`.
        self.history: list[tuple[float, str]] = []

    def start(self) -> None:
        self._now = time.monotonic()
        for kind, rng in self._rngs.items():
            self._later(FIRST * rng.uniform(*INTERVALS[kind]), partial(self._strike, kind))
        self._thread.start()

    def close(self) -> None:
        """Strikes no more; workers that are stopped go on."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        for worker in self._workers:
            worker.resume()

    def _run(self) -> None:
        while self._due and not self._closing.wait(max(0.0, self._due[0][0] - time.monotonic())):
            self._now, _, what = heapq.heappop(self._due)
            what()

    def _later(self, seconds: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._due, (self._now + seconds, next(self._ties), what))

    def _strike(self, kind: str) -> None:
        rng = self._rngs[kind]
        name = self._faults[kind](rng)
        if name is None:
            self._later(POSTPONED, partial(self._strike, kind))
            return
        self.counts[name] += 1
        self.history.append((time.monotonic(), kind))
        self._later(rng.uniform(*INTERVALS[kind]), partial(self._strike, kind))

    # Each of these strikes and returns what it did, or None if there was nothing to strike.

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
        self._later(rng.uniform(*STOPPED), worker.resume)
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
        return "lag" if self._proxy.lag(rng, rng.uniform(*LAG), rng.uniform(*LAGGING)) else None

    def _drop(self, rng: random.Random) -> str | None:
        assert self._proxy is not None
        kind = rng.choice(["reset", "truncation", "blackhole"])
        match kind:
            case "reset":
                struck = self._proxy.reset(rng)
            case "truncation":
                struck = self._proxy.truncate(rng)
            case _:
                struck = self._proxy.blackhole(rng, rng.uniform(*DARK))
        return kind if struck else None

    def _corrupt(self, rng: random.Random) -> str | None:
        assert self._proxy is not None
        return "corruption" if self._proxy.corrupt(rng) else None
