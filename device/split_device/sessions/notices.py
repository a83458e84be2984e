"""What is said while sessions wait: that a worker is gone, how to start one, and which one has taken over."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from split_common.errors import Busy, NoWorker, SessionLost, SplitError, StepFailed, WorkerGone, WorkerSlow

log = logging.getLogger(__name__)

#: Takes one line of text, on any thread.
OnNotice = Callable[[str], None]

#: Seconds within which the same is said once: many sessions lose the same worker.
REPEAT = 60.0

#: Seconds of waiting after which it is said. Mostly, another worker is found sooner, or it is clear that there is
#: none.
LOOK = 1.0


class Notices:
    """Says what happens to a client's sessions, the same once within `REPEAT` seconds. Any thread may use it.

    Args:
        say: where it is said; None for the log.
    """

    def __init__(self, say: OnNotice | None = None) -> None:
        self._say: OnNotice = say or (lambda text: log.warning("%s", text))
        self._lock = threading.Lock()
        #: When each text was said, by `time.monotonic`.
        self._said: dict[str, float] = {}

    def say(self, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._said = {known: at for known, at in self._said.items() if now - at < REPEAT}
            if text in self._said:
                return
            self._said[text] = now
        self._say(text)

    def also(self, say: OnNotice | None) -> OnNotice:
        """A function that says something here, and in another place, too."""
        if say is None:
            return self.say

        def both(text: str) -> None:
            self.say(text)
            say(text)

        return both


class WorkerWait:
    """The wait of one step for a worker, and what is said of it. The caller brings the clock, in seconds.

    Args:
        say: takes what is said.
        patience: seconds that the step waits.
        command: starts a worker that would do.
    """

    def __init__(self, say: OnNotice, patience: float, command: str) -> None:
        self._say, self._patience, self._command = say, patience, command
        self._since: float | None = None
        #: Why another worker is needed, e.g. "worker w is gone"; empty if none is.
        self._lost = ""
        #: Whether it is the first worker that is waited for.
        self._first = False
        #: What is said when the step has waited for `LOOK`; empty if it was said.
        self._pending = ""
        self._said = False
        #: Whether it was said how to start a worker.
        self._advised = False

    def failed(self, error: SplitError, now: float, first: bool = False) -> None:
        """Notes why a try has failed, after which there is another one.

        Args:
            first: whether no worker has been there yet.
        """
        if isinstance(error, WorkerGone | WorkerSlow):
            self._since, self._lost, self._said, self._advised = now, str(error), False, False
            self._pending = f"{error}: looking for another one"
        elif isinstance(error, NoWorker) and not self._advised:
            self._advised = True
            self._first = first
            self._lost = self._lost or ("there is no worker yet" if first else "no worker is left")
            waiting = f"waiting {self._patience:g} s for {'one' if first else 'another one'}"
            self._tell(f"{self._lost}: {waiting}; start one with `{self._command}`")
        elif isinstance(error, Busy) and not self._said:
            self._since = now if self._since is None else self._since
            lost = f"{self._lost}: " if self._lost else ""
            self._pending = f"{lost}waiting {self._patience:g} s for a worker: {error}"
        self.look(now)

    def look(self, now: float) -> None:
        """Says that the step waits, once it has waited for long."""
        if self._pending and self._since is not None and now - self._since >= LOOK:
            self._tell(self._pending)

    def over(self, worker: str) -> None:
        """Notes that a worker of this name has the session."""
        if self._lost:
            # A worker that only stalled may be the one that takes over.
            same = self._lost.startswith(f"worker {worker} ")
            news = "is there" if self._first else "is back" if same else "has taken over"
            taken = f"worker {worker} {news}"
            self._say(taken if self._said else f"{self._lost}; {taken}")
        self._since, self._lost, self._pending = None, "", ""
        self._said = self._advised = self._first = False

    def ended(self, error: SplitError) -> SplitError:
        """The error that ends the wait for another worker: it says what to do."""
        if not isinstance(error, SessionLost) or isinstance(error, StepFailed):
            return error
        waited = f"{error}, and no other took over within {self._patience:g} s"
        return SessionLost(f"{waited}: start one with `{self._command}`")

    def _tell(self, text: str) -> None:
        self._pending, self._said = "", True
        self._say(text)
