"""Where a hostile member acts: the fleet as it sees it, when it has to end, and what it has done so far."""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import zmq

from split_common.errors import SplitError
from split_common.protocol import headers
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Certificate, Identity, ModelScope, Role

#: Seconds to wait after an attempt that failed, e.g. because the fleet refuses the connection.
RETRY_DELAY = 0.05

#: Seconds that a hostile member waits for an answer that it needs.
PATIENCE = 5.0


@dataclass
class Scene:
    """What a mode needs to know. Its threads share it."""

    #: Of the queue, with this member's user in it if it is Redis.
    address: str
    fleet: Fleet
    identity: Identity
    #: The body that the honest workers serve, the checkpoint's directory, and the width of its hidden states.
    service: headers.Service
    model: str
    width: int
    stop: threading.Event
    seed: int = 0
    #: What was done (`acts`), and what failed, by type of error.
    counts: Counter[str] = field(default_factory=Counter)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def running(self) -> bool:
        return not self.stop.is_set()

    @property
    def member(self) -> str:
        return self.identity.certificate.name

    @property
    def role(self) -> Role:
        return self.identity.certificate.role

    def number(self) -> int:
        """A number that no earlier channel or session of this process has."""
        return next(self._numbers)

    def pause(self, seconds: float) -> None:
        """Waits, at most until the end."""
        self.stop.wait(seconds)

    def acted(self, times: int = 1) -> None:
        """Counts what was done."""
        self.counts["acts"] += times

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Counts what fails within a block, because the fleet defends itself, and waits a moment."""
        # redis-py is not imported by modes over ZeroMQ; its errors derive from Exception alone.
        try:
            yield
        except (SplitError, zmq.ZMQError, OSError, queue.Empty) as error:
            self._failed(error)
        except Exception as error:
            if not type(error).__module__.startswith("redis."):
                raise
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.counts[type(error).__name__] += 1
        self.pause(RETRY_DELAY)

    def verify(self, certificate: bytes, role: Role) -> Certificate:
        """Checks the certificate of a peer as honest peers do."""
        scope = ModelScope(self.service.root, self.service.first, self.service.last)
        return self.fleet.verify(certificate, role, scope)

    def run_threads(self, count: int, work: Callable[[], None]) -> None:
        """Runs the same work on several threads, and returns when all have ended."""
        threads = [threading.Thread(target=work, name=f"hostile-{index}", daemon=True) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
