"""The compute loop: requests in, batches through the runner, replies out. The worker's hot path."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from split_common import wire
from split_common.engine.rows import Run
from split_common.engine.runner import Runner
from split_common.engine.scheduler import Job, Piece, Scheduler
from split_common.errors import Busy, Malformed, NonFinite, Oversized, PromptTooLong, SplitError
from split_common.tensors import dtype_name, from_bytes, to_bytes
from split_worker.sessions import Session, SessionTable

log = logging.getLogger(__name__)

#: What a device is told for each error that a request may raise; all others end the session as "failed".
REASONS: dict[type[Exception], str] = {
    Busy: "busy",
    NonFinite: "non-finite",
    Malformed: "malformed",
    Oversized: "malformed",
    PromptTooLong: "too-long",
}


#: Seconds after which a turn of the compute loop may be held to hang: three heartbeats. One with many tokens gets
#: more: so many times what the slowest ones of late would have taken. Of the first one nothing is known.
HUNG_AFTER = 3.0
HUNG_FACTOR = 4.0
FIRST_TURN = 60.0


class Evicted(SplitError):
    """The session's memory went to another one."""


class Closed(Exception):
    """The session was closed: nobody waits for the reply."""


@dataclass(eq=False)
class Task:
    """A request to run: decrypted, in order, of a session that exists."""

    session: Session
    header: wire.Relay
    request: wire.AnyRequest
    tensor: memoryview
    arrived: float
    host_seconds: float = 0.0


#: Seals and sends the reply of a task.
Reply = Callable[[Task, wire.Payload, memoryview | bytes], None]


class Watch:
    """Whether a turn of the compute loop takes so much longer than others that it may never end."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._allowed = FIRST_TURN
        #: Seconds for each token of the slowest turns of late.
        self._slowest: float | None = None

    def begin(self, tokens: int) -> None:
        if self._slowest is not None:
            self._allowed = max(HUNG_AFTER, HUNG_FACTOR * self._slowest * tokens)
        self._tokens = tokens
        self._began = time.monotonic()

    def end(self) -> None:
        assert self._began is not None
        took = (time.monotonic() - self._began) / self._tokens
        self._slowest = max(0.9 * (self._slowest or 0.0), took)
        self._began = None

    def overdue(self) -> float:
        """Seconds that the turn under way has taken, if they are too many; else 0."""
        took = time.monotonic() - began if (began := self._began) is not None else 0.0
        return took if took > self._allowed else 0.0


class ComputeLoop:
    """Runs tasks in a thread of its own, as many in one forward as are ready.

    Args:
        runner: the body.
        sessions: the worker's sessions, used under `lock`.
        reply: called for each task, on this thread.
        on_failure: called, on this thread, when the loop has ended by an error.
    """

    def __init__(
        self,
        runner: Runner,
        sessions: SessionTable,
        lock: threading.RLock,
        reply: Reply,
        on_failure: Callable[[], None],
    ) -> None:
        self._runner = runner
        self._sessions = sessions
        self._lock = lock
        self._reply = reply
        self._on_failure = on_failure
        #: What ended the loop, if it was not `stop`.
        self.failure: BaseException | None = None
        self._watch = Watch()
        self._hung = False
        self._inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._scheduler = Scheduler(runner.store, self._make_room, divisible=not runner.positions_interact)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lambda-split-compute", daemon=True)
        self._batch_seconds = 0.0
        #: Bytes of requests that wait to be computed.
        self.queued_bytes = 0
        #: Forwards and the rows in them, steps and their tokens, microseconds that steps waited and that forwards
        #: took, evictions, refusals by reason.
        self.counters: Counter[str] = Counter()

    def start(self) -> None:
        self._thread.start()

    def put(self, task: Task) -> None:
        """Called under the lock."""
        self.queued_bytes += len(task.tensor)
        self._inbox.put(task)

    def wake(self) -> None:
        """Closed sessions wait to be freed."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Ends after the forward that is under way, unless that one hangs."""
        self._stopping.set()
        self.wake()
        while self._thread.is_alive() and not self._watch.overdue():
            self._thread.join(0.5)

    def stuck(self) -> bool:
        """Whether it has work and seems not to get on with it."""
        overdue = self._watch.overdue()
        if overdue and not self._hung:
            log.warning("a step has taken %.0f s and does not end: out of the queue until it does", overdue)
            self.counters["hung"] += 1
        self._hung = overdue > 0
        return self._hung

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self.turn()
            with self._lock:
                self._sessions.close_where(lambda _: True)
            self._free_closed()
        except BaseException as error:
            log.debug("the compute loop failed", exc_info=error)
            self.failure = error
            self._on_failure()

    def turn(self) -> None:
        """Takes in what has arrived and runs one forward; waits when there is nothing to do."""
        self._take_in()
        batch = self._scheduler.next_batch() if not self._stopping.is_set() else []
        if not batch:
            return
        self._watch.begin(sum(len(piece.run.positions) for piece in batch))
        began = time.perf_counter()
        outputs = self._forward(batch)
        self._batch_seconds = time.perf_counter() - began
        self._count(batch, began)
        done = [(piece, output) for piece, output in zip(batch, outputs, strict=True) if output is not None]
        self._scheduler.finish([piece for piece, _ in done], [output for _, output in done], self._batch_seconds)
        self._watch.end()

    def _take_in(self) -> None:
        """Takes what has arrived; waits for it if there is nothing else to do."""
        try:
            task = self._inbox.get(block=self._scheduler.idle)
            while True:
                if task is not None:
                    self._accept(task)
                task = self._inbox.get_nowait()
        except queue.Empty:
            pass
        self._free_closed()

    def _free_closed(self) -> None:
        with self._lock:
            closed = [self._sessions.closed.popleft() for _ in range(len(self._sessions.closed))]
        for session in closed:
            self._scheduler.cancel(session, Closed())
            session.free()

    def _accept(self, task: Task) -> None:
        with self._lock:
            held = self._sessions.get(task.session.id) is task.session
        if not held:
            # It arrived while the session was evicted or closed, whose rows are free by now.
            self._finish(task, Evicted("the session's memory went to an older one"))
            return
        request = task.request
        tokens = request.tokens if isinstance(request, wire.Step) else 0
        self._scheduler.add(
            Job(
                task.session,
                task.session.id[0],
                tokens,
                start=lambda: self._start(task),
                finish=lambda outcome: self._finish(task, outcome),
            )
        )

    def _start(self, task: Task) -> Sequence[Run]:
        match task.request:
            case wire.Fork() as fork:
                self._fork(task, fork)
                return []
            case wire.Step() as step:
                began = time.perf_counter()
                self._check_size(step)
                states = from_bytes(task.tensor, step.dtype, step.tokens, step.width)
                runs = task.session.begin(step, states, self._runner)
                task.host_seconds += time.perf_counter() - began
                return runs
        raise Malformed("a request that is not computed")

    def _check_size(self, step: wire.Step) -> None:
        """Raises Oversized when the answer, in the body's dtype, would be no message any more."""
        size = step.tokens * step.width * self._runner.dtype.itemsize
        if size > wire.MAX_BODY // 2:
            raise Oversized(f"a step whose answer has {size} bytes: send it in chunks")

    def _fork(self, task: Task, request: wire.Fork) -> None:
        device, channel, *_ = task.session.id
        with self._lock:
            parent = self._sessions.get((device, channel, request.parent, request.parent_epoch))
        if parent is None:
            raise Evicted("the worker does not hold the session that was to be copied")
        task.session.rows = [row.fork() for row in parent.rows]

    def _forward(self, batch: Sequence[Piece]) -> list[torch.Tensor | None]:
        """The outputs of a batch; None for those that failed, which are found by running each by itself."""
        lengths = [piece.run.row.length for piece in batch]
        try:
            return list(self._runner.run([piece.run for piece in batch]))
        except Exception as error:
            for piece, length in zip(batch, lengths, strict=True):
                if piece.run.row.length > length:
                    piece.run.row.truncate(length)
            if len({id(piece.job) for piece in batch}) == 1:
                log.error("a step failed: %s", type(error).__name__)
                self._scheduler.fail(batch[0].job, error)
                return [None] * len(batch)
        jobs: dict[int, list[int]] = {}
        for index, piece in enumerate(batch):
            jobs.setdefault(id(piece.job), []).append(index)
        outputs: list[torch.Tensor | None] = [None] * len(batch)
        for indices in jobs.values():
            for index, output in zip(indices, self._forward([batch[i] for i in indices]), strict=True):
                outputs[index] = output
        return outputs

    def _finish(self, task: Task, outcome: torch.Tensor | Exception) -> None:
        """Answers a task with its output or with the error that it is refused with."""
        with self._lock:
            self.queued_bytes -= len(task.tensor)
        if isinstance(outcome, Closed):
            return
        began = time.perf_counter()
        reply: wire.Payload
        tensor: memoryview | bytes = b""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(task.request, wire.Step):
                tensor = to_bytes(outcome)
                reply = self._result(task, task.request, outcome, began)
            else:
                reply = wire.Done()
            task.session.commit()
        except SplitError as error:
            reply = self._refusal(error)
            task.session.undo()
        except Exception as error:
            reply = self._refusal(error)
        self._reply(task, reply, tensor)
        if isinstance(reply, wire.Refusal) and reply.reason == "failed":
            # Its rows may be half written: the device starts another session.
            with self._lock:
                self._sessions.close(task.session.id)

    def _result(self, task: Task, step: wire.Step, output: torch.Tensor, began: float) -> wire.Result:
        task.session.forget(step.acked)
        host = task.host_seconds + time.perf_counter() - began
        body = min(self._batch_seconds, began - task.arrived)
        self.counters["steps"] += 1
        self.counters["tokens"] += step.tokens
        self.counters["queue_us"] += round((began - task.arrived - body) * 1e6)
        name = dtype_name(output.dtype)
        return wire.Result(name, output.shape[0], output.shape[1], round(body * 1e6), round(host * 1e6))

    def _refusal(self, error: Exception) -> wire.Refusal:
        reason = "evicted" if isinstance(error, Evicted) else REASONS.get(type(error), "failed")
        self.counters[f"refused_{reason}"] += 1
        message = str(error) if isinstance(error, SplitError) else type(error).__name__
        retry_after = min(getattr(error, "retry_after", 0.0), wire.MAX_RETRY_AFTER)
        return wire.Refusal(reason, message[:2048], retry_after)  # type: ignore[arg-type]

    def _make_room(self, job: Job) -> bool:
        """Frees the memory of one session for a job that does not fit."""
        asking = job.session
        assert isinstance(asking, Session)
        with self._lock:
            victim = self._sessions.victim(asking)
            if victim is None:
                return False
            self._sessions.evict(victim)
        self.counters["evictions"] += 1
        self._scheduler.cancel(victim, Evicted("the session's memory went to an older one"))
        victim.free()
        return True

    def _count(self, batch: Sequence[Piece], began: float) -> None:
        self.counters["forwards"] += 1
        self.counters["rows"] += len(batch)
        self.counters["body_us"] += round((time.perf_counter() - began) * 1e6)
