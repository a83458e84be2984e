"""Running queued jobs, many at once, so that whatever kills the process loses a fraction of a second of work."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

from split_common.errors import BrokerUnreachable, Busy, NoWorker, SessionLost, SplitError, StepFailed
from split_device.generator import Generation
from split_device.jobs.job import FinishReason, Job, ModelChoice, Piece, Update
from split_device.jobs.models import Models
from split_device.jobs.store import Store
from split_device.jobs.text import TextStream

log = logging.getLogger(__name__)

#: Seconds between two writes of what has come: what a killed process generates again.
WRITE_INTERVAL = 0.2

#: Seconds until a model's jobs are tried again when no worker was there for them: at first, and at most.
MIN_PAUSE = 1.0
MAX_PAUSE = 30.0

#: Errors that pass when a broker or a worker comes back.
PASSING = (BrokerUnreachable, Busy, NoWorker, SessionLost)


@dataclass
class _Running:
    """A job that is being generated. `update` is what of it is not written yet."""

    job: Job
    generation: Generation
    text: TextStream
    update: Update
    cancelled: bool = False


@dataclass
class _Trouble:
    """No worker or no broker for a model, since when, and when to look again (monotonic seconds)."""

    since: float
    pause: float
    until: float


class Runner:
    """Runs the jobs of a store with the models of `models`.

    Args:
        limit: jobs at once.
        give_up: seconds that a model's jobs are tried while no worker or broker is there; then they fail.
        notice: told, once for each spell, why jobs wait.
    """

    def __init__(
        self,
        store: Store,
        models: Models,
        limit: int,
        give_up: float,
        notice: Callable[[str], None] = log.warning,
    ) -> None:
        self._store = store
        self._models = models
        self._limit = limit
        self._give_up = give_up
        self._notice = notice
        self._running: dict[str, _Running] = {}
        self._trouble: dict[ModelChoice, _Trouble] = {}
        #: What the generators' threads pass on: a job's id, a token, the random generator's state after it.
        self._tokens: queue.SimpleQueue[tuple[str, int, bytes | None]] = queue.SimpleQueue()

    def turn(self) -> None:
        """Starts what there is room for, and writes what has come."""
        self._start()
        for id_ in self._store.cancelling():
            if id_ in self._running:
                self._running[id_].cancelled = True
                self._running[id_].generation.cancel()
        time.sleep(WRITE_INTERVAL)
        self._write()

    def stop(self) -> None:
        """Breaks off what runs: it goes on from where it was when it is run again."""
        for running in self._running.values():
            running.generation.cancel()
        while self._running:
            self._write()
            time.sleep(0.01)

    def _start(self) -> None:
        room = self._limit - len(self._running)
        now = time.monotonic()
        waiting = [choice for choice, trouble in self._trouble.items() if trouble.until > now]
        for job in self._store.claim(room, waiting) if room else ():
            update = Update(id=job.id, piece=Piece([], ""))
            try:
                over = self._begin(job, update)
            except Exception as error:
                self._fail(job, update, error)
                over = True
            if over:
                self._store.write([update])

    def _begin(self, job: Job, update: Update) -> bool:
        """Starts a job; or, if it was killed between its last token and its end, ends it and returns True."""
        if self._waits(job.task.model):
            update.state = "queued"
            return True
        loaded = self._models.get(job.task.model)
        progress = self._store.progress(job.id)
        request = loaded.request(job.task, progress, job.priority)
        update.prompt_tokens = len(request.prompt)
        text = TextStream(loaded.tokenizer, job.task.stop)
        for token in progress.tokens:
            text.push(token)
        ended = text.stopped or (bool(progress.tokens) and progress.tokens[-1] in loaded.end_tokens)
        if ended or len(progress.tokens) >= request.config.max_new_tokens:
            _succeed(update, text, "stop" if ended else "length")
            return True

        def on_token(token: int, _logprobs: object, sampler: bytes | None) -> None:
            self._tokens.put((job.id, token, sampler))

        generation = loaded.generator.submit(request, on_token)
        self._running[job.id] = _Running(job, generation, text, update)
        return False

    def _write(self) -> None:
        # Looked at before the tokens are taken: all those of a generation that has ended by now are there.
        ended = [running for running in self._running.values() if running.generation.done]
        while not self._tokens.empty():
            id_, token, sampler = self._tokens.get()
            self._take(self._running[id_], token, sampler)
        for running in ended:
            self._conclude(running)
        updates = [running.update for running in self._running.values() if running.update.worth_writing]
        if updates:
            self._store.write(updates)
        for running in self._running.values():
            running.update = Update(id=running.job.id, piece=Piece([], ""))
        for running in ended:
            del self._running[running.job.id]

    def _take(self, running: _Running, token: int, sampler: bytes | None) -> None:
        self._trouble.pop(running.job.task.model, None)
        if running.text.stopped:
            return
        update = running.update
        text = update.piece.text + running.text.push(token)
        update.piece = Piece([*update.piece.tokens, token], text)
        update.sampler = sampler
        if running.text.stopped:
            running.generation.cancel()

    def _conclude(self, running: _Running) -> None:
        generation, update = running.generation, running.update
        if running.text.stopped or generation.finish_reason == "stop":
            _succeed(update, running.text, "stop")
        elif generation.error is not None:
            self._fail(running.job, update, generation.error)
        elif generation.finish_reason == "length":
            _succeed(update, running.text, "length")
        else:
            update.state = "cancelled" if running.cancelled else "queued"

    def _fail(self, job: Job, update: Update, error: BaseException) -> None:
        """Queues a job again after an error that passes; ends it after others."""
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, PASSING) and not isinstance(error, StepFailed) and self._wait(job.task.model, message):
            update.state = "queued"
            return
        if not isinstance(error, SplitError):
            log.error("a job failed by an unexpected %s", type(error).__name__)
        update.state = "failed"
        update.error = message

    def _waits(self, choice: ModelChoice) -> bool:
        trouble = self._trouble.get(choice)
        return trouble is not None and trouble.until > time.monotonic()

    def _wait(self, choice: ModelChoice, message: str) -> bool:
        """Whether a model's jobs should wait still, rather than fail."""
        now = time.monotonic()
        trouble = self._trouble.get(choice)
        if trouble is None:
            self._notice(f"jobs wait: {message}")
            trouble = self._trouble[choice] = _Trouble(now, MIN_PAUSE, now + MIN_PAUSE)
        elif trouble.until <= now:
            trouble.pause = min(2 * trouble.pause, MAX_PAUSE)
            trouble.until = now + trouble.pause
        return now - trouble.since < self._give_up


def _succeed(update: Update, text: TextStream, reason: FinishReason) -> None:
    update.piece = Piece(update.piece.tokens, update.piece.text + text.end())
    update.state, update.finish_reason = "succeeded", reason
