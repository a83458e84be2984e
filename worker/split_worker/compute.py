"""The compute loop: requests in, batches through the runner, replies out. The worker's hot path."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from split_common import headers, payloads
from split_common.engine.rows import Run
from split_common.engine.runner import Launched, Runner
from split_common.engine.scheduler import DECODE_TOKENS, Gathering, Job, Piece, Scheduler
from split_common.errors import (
    Busy,
    Malformed,
    NeedEmbeddings,
    NonFinite,
    Oversized,
    PromptTooLong,
    SplitError,
)
from split_common.tensors import dtype_name, from_bytes, to_bytes
from split_worker.diffusion import DiffusionBody
from split_worker.sessions import Session, SessionTable
from split_worker.watch import Watch

log = logging.getLogger(__name__)

#: What a device is told for each error that a request may raise; all others end the session as "failed".
REASONS: dict[type[Exception], str] = {
    Busy: "busy",
    NonFinite: "non-finite",
    Malformed: "malformed",
    Oversized: "malformed",
    PromptTooLong: "too-long",
    NeedEmbeddings: "embeddings",
}


#: Seconds for which requests are taken in while others are ready to be computed: those that need no forward are
#: answered at once, and their device's next ones come meanwhile.
TAKE_IN = 0.1


class Evicted(SplitError):
    """The session's memory went to another one."""


class Closed(Exception):
    """The session was closed: nobody waits for the reply."""


@dataclass(eq=False)
class Task:
    """A request to run: decrypted, in order, of a session that exists."""

    session: Session
    header: headers.Relay
    request: payloads.AnyRequest
    tensor: memoryview
    arrived: float
    host_seconds: float = 0.0


@dataclass
class Forward:
    """Forwards that were launched together: the pieces of each. More than one only after a failure."""

    launched: list[tuple[Sequence[Piece], Launched]]
    began: float

    def wait(self) -> list[tuple[Sequence[Piece], list[torch.Tensor]]]:
        """The output for each piece."""
        return [(pieces, launched.wait()) for pieces, launched in self.launched]


#: Seals and sends the reply of a task.
Reply = Callable[[Task, payloads.Payload, memoryview | bytes], None]


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
        runner: Runner | DiffusionBody,
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
        self._watch = Watch(runner.first_turn) if isinstance(runner, DiffusionBody) else Watch()
        self._hung = False
        self._inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._scheduler = Scheduler(runner.store, self._make_room, divisible=not runner.positions_interact)
        self._gathering = Gathering()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lambda-split-compute", daemon=True)
        self._under_way: Forward | None = None
        self._completed = 0.0
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
        """Takes in what has arrived and launches one forward; waits when there is nothing to do.

        On CUDA the host answers the forward before it meanwhile.
        """
        before, self._under_way = self._under_way, None
        if before is not None:
            before.wait()
            self._watch.end()
        self._take_in(patient=before is None)
        batch = self._scheduler.next_batch() if not self._stopping.is_set() else []
        forward = None
        if batch:
            self._watch.begin(sum(len(piece.run.positions) for piece in batch))
            began = time.perf_counter()
            forward = Forward(self._launch(batch), began)
        if before is not None:
            self._complete(before)
        if forward is not None and forward.launched and self._runner.asynchronous:
            self._under_way = forward
        elif forward is not None:
            self._complete(forward)
            self._watch.end()

    def _take_in(self, patient: bool) -> None:
        """Takes what has arrived; waits if there is nothing else to do, or for sessions that are about to come."""
        if self._scheduler.idle and patient:
            self._accept(self._inbox.get())
        enough = time.perf_counter() + TAKE_IN
        while True:
            now = time.perf_counter()
            gathers = patient and not self._scheduler.hurries
            wait = self._gathering.until(self._scheduler.budget.base, now) - now if gathers else 0.0
            if wait <= 0 and now > enough:
                break
            try:
                self._accept(self._inbox.get(wait > 0, max(0.0, wait)))
            except queue.Empty:
                break
        self._free_closed()

    def _free_closed(self) -> None:
        with self._lock:
            closed = [self._sessions.closed.popleft() for _ in range(len(self._sessions.closed))]
        for session in closed:
            self._scheduler.cancel(session, Closed())
            self._gathering.forget(session)
            session.free()

    def _accept(self, task: Task | None) -> None:
        if task is None:
            self._free_closed()
            return
        with self._lock:
            held = self._sessions.get(task.session.id) is task.session
        if not held:
            # It arrived while the session was evicted or closed, whose rows are free by now.
            self._finish(task, Evicted("the session's memory went to an older one"))
            return
        self._gathering.came(task.session, task.arrived)
        request = task.request
        tokens = request.tokens if isinstance(request, payloads.Step) else 0
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
        if isinstance(task.request, payloads.Fork):
            self._fork(task, task.request)
            return []
        began = time.perf_counter()
        if isinstance(self._runner, DiffusionBody):
            runs: Sequence[Run] = self._runner.start(task.session.rows, task.request, task.tensor)
        elif isinstance(task.request, payloads.Step):
            self._check_size(task.request)
            states = from_bytes(task.tensor, task.request.dtype, task.request.tokens, task.request.width)
            runs = task.session.begin(task.request, states, self._runner)
        else:
            raise Malformed(f"a {type(task.request).__name__} for a language model")
        task.host_seconds += time.perf_counter() - began
        return runs

    def _check_size(self, step: payloads.Step) -> None:
        """Raises Oversized when the answer, in the body's dtype, would be no message any more."""
        size = step.tokens * step.width * self._runner.dtype.itemsize
        if size > headers.MAX_BODY // 2:
            raise Oversized(f"a step whose answer has {size} bytes: send it in chunks")

    def _fork(self, task: Task, request: payloads.Fork) -> None:
        device, channel, *_ = task.session.id
        with self._lock:
            parent = self._sessions.get((device, channel, request.parent, request.parent_epoch))
        if parent is None:
            raise Evicted("the worker does not hold the session that was to be copied")
        task.session.rows = [row.fork() for row in parent.rows]

    def _launch(self, batch: Sequence[Piece]) -> list[tuple[Sequence[Piece], Launched]]:
        """Launches a batch; if that fails, each job by itself, and jobs that fail then are ended."""
        lengths = [piece.run.row.length for piece in batch]
        try:
            return [(batch, self._runner.launch([piece.run for piece in batch]))]
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                # The GPU takes no more work from this process.
                raise
            for piece, length in zip(batch, lengths, strict=True):
                if piece.run.row.length > length:
                    piece.run.row.truncate(length)
            if len({id(piece.job) for piece in batch}) == 1:
                log.error("a step failed: %s", type(error).__name__)
                self._scheduler.fail(batch[0].job, error)
                return []
        jobs: dict[int, list[Piece]] = {}
        for piece in batch:
            jobs.setdefault(id(piece.job), []).append(piece)
        return [launched for pieces in jobs.values() for launched in self._launch(pieces)]

    def _complete(self, forward: Forward) -> None:
        """Waits for a forward and answers what is complete with it."""
        outputs = forward.wait()
        now = time.perf_counter()
        # One that was launched while another ran has waited for that one.
        self._batch_seconds = now - max(forward.began, self._completed)
        self._completed = now
        for pieces, tensors in outputs:
            self.counters["forwards"] += 1
            self.counters["rows"] += len(pieces)
            self._scheduler.finish(pieces, tensors, self._batch_seconds)
        self.counters["body_us"] += round(self._batch_seconds * 1e6)

    def _finish(self, task: Task, outcome: torch.Tensor | Exception) -> None:
        """Answers a task with its output or with the error that it is refused with."""
        with self._lock:
            self.queued_bytes -= len(task.tensor)
        if isinstance(outcome, Closed):
            return
        began = time.perf_counter()
        reply: payloads.Payload
        tensor: memoryview | bytes = b""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(task.request, payloads.Step):
                tensor = to_bytes(outcome)
                reply = self._result(task, task.request, outcome, began)
            elif isinstance(self._runner, DiffusionBody):
                reply, tensor = self._runner.answer(task.session.rows, task.request, outcome)
                if isinstance(reply, payloads.Denoised) and isinstance(task.request, payloads.Denoise):
                    body_us, worker_us = self._account(task, task.request, began)
                    reply = msgspec.structs.replace(reply, body_us=body_us, worker_us=worker_us)
            else:
                reply = payloads.Done()
            task.session.commit()
        except SplitError as error:
            reply = self._refusal(error)
            task.session.undo()
        except torch.AcceleratorError:
            # The GPU takes no more work from this process.
            raise
        except Exception as error:
            reply = self._refusal(error)
        self._reply(task, reply, tensor)
        if isinstance(reply, payloads.Result) and reply.tokens <= DECODE_TOKENS:
            self._gathering.answered(task.session, time.perf_counter())
        if isinstance(reply, payloads.Refusal) and reply.reason == "failed":
            # Its rows may be half written: the device starts another session.
            with self._lock:
                self._sessions.close(task.session.id)
            self.wake()

    def _result(self, task: Task, step: payloads.Step, output: torch.Tensor, began: float) -> payloads.Result:
        self.counters["tokens"] += step.tokens
        return payloads.Result(
            dtype_name(output.dtype), output.shape[0], output.shape[1], *self._account(task, step, began)
        )

    def _account(self, task: Task, step: payloads.Step | payloads.Denoise, began: float) -> tuple[int, int]:
        """Counts a step that has run: microseconds in the body, and elsewhere in this process."""
        task.session.forget(step.acked)
        host = task.host_seconds + time.perf_counter() - began
        body = min(self._batch_seconds, began - task.arrived)
        self.counters["steps"] += 1
        self.counters["queue_us"] += round((began - task.arrived - body) * 1e6)
        return round(body * 1e6), round(host * 1e6)

    def _refusal(self, error: Exception) -> payloads.Refusal:
        reason = "evicted" if isinstance(error, Evicted) else REASONS.get(type(error), "failed")
        self.counters[f"refused_{reason}"] += 1
        message = str(error) if isinstance(error, SplitError) else type(error).__name__
        retry_after = min(getattr(error, "retry_after", 0.0), headers.MAX_RETRY_AFTER)
        return payloads.Refusal(reason, message[:2048], retry_after)  # type: ignore[arg-type]

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
        self._gathering.forget(victim)
        victim.free()
        return True
