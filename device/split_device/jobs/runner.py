"""Runs queued jobs, many at once. Killing the process loses a fraction of a second of work."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from split_common.errors import BrokerUnreachable, Busy, NoWorker, SessionLost, SplitError, StepFailed
from split_common.system.signals import delay_signals
from split_device.jobs.execution import ImageExecution, JobExecution, TextExecution
from split_device.jobs.job import AnyChoice, ImageTask, Job, JobKind, Update
from split_device.jobs.models import Models
from split_device.jobs.store import Store

log = logging.getLogger(__name__)

#: Interval between two writes of progress, in seconds: the work that a killed process repeats.
WRITE_INTERVAL = 0.2

#: First and longest delay before the jobs of a model without a worker are tried again, in seconds.
MIN_PAUSE = 1.0
MAX_PAUSE = 30.0

#: Errors that go away when a broker or a worker comes back.
TRANSIENT = (BrokerUnreachable, Busy, NoWorker, SessionLost)


@dataclass
class _Backoff:
    """A model without a worker or broker: since when, and when to try again (monotonic seconds)."""

    since: float
    pause: float
    until: float


class JobRunner:
    """Runs the jobs of a store with the models of `models`, as many at once as its limits allow.

    Args:
        give_up: how long jobs of a model without worker or broker are retried before they fail, in seconds.
        notice: called with the reason when jobs begin to wait.
        progressed: called when jobs have made progress.
    """

    def __init__(
        self,
        store: Store,
        models: Models,
        give_up: float,
        notice: Callable[[str], None] = log.warning,
        progressed: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._models = models
        self._give_up = give_up
        self._notice = notice
        self._progressed = progressed
        self._running: dict[str, JobExecution] = {}
        self._backoffs: dict[AnyChoice, _Backoff] = {}

    def turn(self) -> None:
        """Starts jobs, waits for a moment, and writes progress."""
        self.begin()
        time.sleep(WRITE_INTERVAL)
        self.write()

    @property
    def running(self) -> Counter[JobKind]:
        """How many jobs of each kind run."""
        return Counter(running.job.kind for running in self._running.values())

    def begin(self, busy: Counter[JobKind] | None = None) -> None:
        """Starts jobs up to the limits, and cancels what users cancelled.

        Args:
            busy: how many jobs other runners run with the same models; they take room.
        """
        busy = busy or Counter()
        self._start("text", self._models.limits.requests - busy["text"])
        self._start("image", self._models.limits.images - busy["image"])
        for id_ in self._store.cancelling():
            if id_ in self._running:
                self._running[id_].cancelled = True
                self._running[id_].cancel()

    def stop(self) -> None:
        """Interrupts the running jobs; they continue where they stopped when they run again."""
        for running in self._running.values():
            running.cancel()
        while self._running:
            self.write()
            time.sleep(0.01)
        # Jobs that were claimed but not begun.
        self._store.recover()

    def _start(self, kind: JobKind, limit: int) -> None:
        room = max(0, limit - self.running[kind])
        now = time.monotonic()
        waiting = [choice for choice, backoff in self._backoffs.items() if backoff.until > now]
        for job in self._store.claim(room, waiting, kind) if room else ():
            if self._backs_off(job.task.model):
                self._store.write([Update(id=job.id, state="queued")])
                continue
            try:
                self._running[job.id] = self._begin(job)
            except Exception as error:
                update = Update(id=job.id)
                self._fail(job, update, error)
                self._store.write([update])

    def _begin(self, job: Job) -> JobExecution:
        if isinstance(job.task, ImageTask):
            return ImageExecution(job, job.task, self._models.pipeline(job.task.model))
        return TextExecution(job, job.task, self._models.get(job.task.model), self._store.progress(job.id))

    def write(self) -> None:
        """Writes the progress and the ends of the running jobs.

        A signal that comes meanwhile is handled afterwards: no token is stored twice, or taken and not stored.
        """
        with delay_signals():
            self._write()

    def _write(self) -> None:
        # Checked before collecting: all output of a job that is done by now is there to be collected.
        ended = [running for running in self._running.values() if running.done]
        moved = [running for running in self._running.values() if running.collect()]
        for running in moved:
            if self._backoffs.pop(running.job.task.model, None) is not None:
                self._notice("the wait is over")
        if moved:
            self._progressed()
        for running in ended:
            error = running.conclude()
            if error is not None:
                self._fail(running.job, running.update, error)
        updates = [running.update for running in self._running.values() if running.update.worth_writing]
        if updates:
            self._store.write(updates)
        for running in self._running.values():
            running.update = Update(id=running.job.id)
        for running in ended:
            del self._running[running.job.id]

    def _fail(self, job: Job, update: Update, error: BaseException) -> None:
        """Requeues a job after a transient error; ends it after any other."""
        message = f"{type(error).__name__}: {error}"
        if (
            isinstance(error, TRANSIENT)
            and not isinstance(error, StepFailed)
            and self._back_off(job.task.model, str(error))
        ):
            update.state = "queued"
            return
        if not isinstance(error, SplitError):
            log.error("a job failed with an unexpected %s", type(error).__name__)
        update.state = "failed"
        update.error = message

    def _backs_off(self, choice: AnyChoice) -> bool:
        backoff = self._backoffs.get(choice)
        return backoff is not None and backoff.until > time.monotonic()

    def _back_off(self, choice: AnyChoice, message: str) -> bool:
        """Starts or extends a model's delay; returns False if its jobs have waited too long and should fail."""
        now = time.monotonic()
        backoff = self._backoffs.get(choice)
        if backoff is None:
            self._notice(f"waiting: {message}")
            backoff = self._backoffs[choice] = _Backoff(now, MIN_PAUSE, now + MIN_PAUSE)
        elif backoff.until <= now:
            backoff.pause = min(2 * backoff.pause, MAX_PAUSE)
            backoff.until = now + backoff.pause
        return now - backoff.since < self._give_up
