"""The compute loop: takes requests, runs them through the body in batches, and replies. The worker's hot path."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from split_common.engine.forward_times import WAIT_AHEAD, BatchDelay
from split_common.engine.scheduler import Scheduler
from split_common.engine.steps import ScheduledChunk, ScheduledStep
from split_common.errors import Busy, Evicted, Malformed, SplitError
from split_common.models.tensors import use_gpu
from split_common.protocol import payloads
from split_worker.bodies.base import AnyBody, Forward
from split_worker.requests import Closed, PendingRequest, refusal
from split_worker.sessions import Session, SessionTable
from split_worker.waiting import WaitingRequests
from split_worker.watchdog import Watchdog

log = logging.getLogger(__name__)

#: Most seconds for which a turn takes in requests that have arrived. It needs a limit, because requests without a
#: forward are answered at once, and their devices' next ones arrive meanwhile.
TAKE_IN = 0.1

#: Seconds after which a device may repeat a step that did not fit into memory.
MEMORY_RETRY = 0.5

Step = ScheduledStep[PendingRequest, Any]
Chunk = ScheduledChunk[PendingRequest, Any]

#: The forwards that were launched, each with its chunks.
Launched = list[tuple[Sequence[Chunk], Forward]]


@dataclass
class Batch:
    """Forwards that were launched together: one, or several after a failure."""

    #: When they were launched, in seconds of `time.perf_counter`.
    began: float
    forwards: Launched

    def wait(self) -> list[tuple[Sequence[Chunk], list[torch.Tensor]]]:
        """Waits for the forwards. Returns the chunks of each, and the output of each chunk."""
        return [(chunks, forward.wait()) for chunks, forward in self.forwards]


#: Seals and sends the reply to a request.
Reply = Callable[[PendingRequest, payloads.Payload, memoryview | bytes], None]


class ComputeLoop:
    """Computes requests on a thread of its own, all that are ready in one forward.

    Args:
        body: the body that computes.
        sessions: the worker's sessions, used under `lock`.
        lock: the worker's.
        reply: called on the loop's thread for each request.
        on_failure: called on the loop's thread when an error has ended the loop.
    """

    def __init__(
        self,
        body: AnyBody,
        sessions: SessionTable,
        lock: threading.RLock,
        reply: Reply,
        on_failure: Callable[[], None],
    ) -> None:
        self._body = body
        self._sessions = sessions
        self._lock = lock
        self._reply = reply
        self._on_failure = on_failure
        #: The error that ended the loop, if one did.
        self.failure: BaseException | None = None
        self._watchdog = Watchdog(body.first_turn, sessions.limits.hung_after)
        self._hung = False
        self._inbox: queue.SimpleQueue[PendingRequest | None] = queue.SimpleQueue()
        self._scheduler = Scheduler[PendingRequest, Any](body.store, divisible=body.divisible, holding=True)
        self._delay = BatchDelay()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lambda-split-compute", daemon=True)
        #: When the last batch was complete, in seconds of `time.perf_counter`.
        self._completed = 0.0
        self._waiting = WaitingRequests()
        #: Forwards and the rows in them, steps and their tokens, microseconds that steps waited and that forwards
        #: took, evictions, and refusals by reason.
        self.counters: Counter[str] = Counter()

    def start(self) -> None:
        self._thread.start()

    def put(self, request: PendingRequest) -> None:
        """Queues a request. Called under the lock."""
        self._waiting.add(request)
        self._inbox.put(request)

    @property
    def queued_bytes(self) -> int:
        """Bytes of requests that wait to be computed."""
        return self._waiting.total

    def is_full(self, member: str, size: int) -> bool:
        """Whether another `size` bytes of a member are refused for now. Called under the lock."""
        return self._waiting.is_full(member, size, self._sessions.limits.max_queued_bytes)

    def wake(self) -> None:
        """Lets go of what closed sessions wait for, and makes the loop free them soon. Called on any thread."""
        with self._lock:
            for session in self._sessions.closed:
                self._waiting.release(session)
        self._inbox.put(None)

    def stop(self) -> None:
        """Ends the loop and waits for the current forward, unless that one hangs."""
        self._stopping.set()
        self.wake()
        while self._thread.is_alive() and not self._watchdog.overdue():
            self._thread.join(0.5)

    def stuck(self) -> bool:
        """Whether a turn seems to hang. Called on the transport's thread."""
        overdue = self._watchdog.overdue()
        if overdue and not self._hung:
            log.warning("a step has taken %.0f s and does not end: out of the queue until it does", overdue)
            self.counters["hung"] += 1
        self._hung = overdue > 0
        return self._hung

    # --- the loop ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            # Each thread has a current GPU of its own.
            use_gpu(self._body.device)
            under_way: Batch | None = None
            while not self._stopping.is_set():
                under_way = self.turn(under_way)
            with self._lock:
                self._sessions.close_where(lambda _: True)
            self._free_closed()
        except BaseException as error:
            log.debug("the compute loop failed", exc_info=error)
            self.failure = error
            self._on_failure()

    def turn(self, under_way: Batch | None) -> Batch | None:
        """Takes requests in, schedules and launches one batch, and answers one. Waits if there is nothing to do.

        Args:
            under_way: the batch that the previous turn has left running.

        Returns:
            The batch that this turn leaves running. On CUDA, the host answers one batch while the next one runs.
        """
        if under_way is not None:
            under_way.wait()
            self._watchdog.end()
        self._take_in(patient=under_way is None)
        batch = None
        if chunks := self._schedule():
            self._watchdog.begin(sum(chunk.run.cost for chunk in chunks))
            batch = Batch(time.perf_counter(), self._launch(chunks))
        if under_way is not None:
            self._complete(under_way)
        if batch is None or (self._body.asynchronous and batch.forwards):
            return batch
        self._complete(batch)
        self._watchdog.end()
        return None

    def _take_in(self, patient: bool) -> None:
        """Takes the requests that have arrived. If patient, waits for a first one, and for due sessions."""
        if patient and (self._scheduler.idle or self._scheduler.holds):
            with contextlib.suppress(queue.Empty):
                self._accept(self._inbox.get(timeout=self._scheduler.holds or None))
        forward, began = self._scheduler.budget.base, time.perf_counter()
        # However many sessions are due one after the other, none delays those that are here for long.
        latest, enough = began + 2 * WAIT_AHEAD * forward, began + TAKE_IN
        while True:
            now = time.perf_counter()
            delays = patient and not self._scheduler.has_urgent_prefill
            wait = min(self._delay.until(forward, now), latest) - now if delays else 0.0
            if wait <= 0 and now > enough:
                break
            try:
                self._accept(self._inbox.get(wait > 0, max(0.0, wait)))
            except queue.Empty:
                break
        self._free_closed()

    def _accept(self, request: PendingRequest | None) -> None:
        if request is None:
            self._free_closed()
            return
        with self._lock:
            held = self._sessions.get(request.session.id) is request.session
        if not held:
            # The session was evicted or closed while the request was queued. Its memory has been freed.
            self._answer(request, Evicted("the session's memory went to another one"))
            return
        self._delay.returned(request.session, request.arrived)
        weight = request.numbers if self._body.store is None else 0
        step = Step(request.session, request.session.member, request.prefill, request, weight)
        self._start(self._scheduler.add(step))

    def _schedule(self) -> list[Chunk]:
        """The chunks of the next forward. If a step does not fit, evicts another session, or refuses the step."""
        for step in self._scheduler.due():
            self._start(step)
        while (overdue := self._scheduler.overdue()) is not None:
            if not self._evict_for(overdue, own=False):
                self._scheduler.wait_on(overdue)
        while not self._stopping.is_set():
            chunks, starved = self._scheduler.next_batch()
            if starved is None:
                return chunks
            if not self._evict_for(starved):
                self._end(starved, Busy("the worker's KV memory is full", retry_after=MEMORY_RETRY))
        return []

    def _launch(self, chunks: Sequence[Chunk]) -> Launched:
        """Launches one forward. If that fails, launches one for each step, and refuses steps whose own fails."""
        try:
            return [(chunks, self._body.launch([chunk.run for chunk in chunks]))]
        except torch.AcceleratorError:
            # The GPU takes no more work from this process.
            raise
        except Exception as error:
            by_step: dict[int, list[Chunk]] = {}
            for chunk in chunks:
                by_step.setdefault(id(chunk.step), []).append(chunk)
            if len(by_step) == 1:
                session, kind = chunks[0].step.request.session, type(error).__name__
                self._sessions.log.error(session.member, "session %s: a step failed: %s", session.label, kind)
                self._end(chunks[0].step, error)
                return []
        return [launched for own in by_step.values() for launched in self._launch(own)]

    def _complete(self, batch: Batch) -> None:
        """Waits for a batch and answers the steps that are complete with it."""
        outputs = batch.wait()
        now = time.perf_counter()
        # If this batch was launched while another one ran, it has waited for that one.
        seconds = now - max(batch.began, self._completed)
        self._completed = now
        for chunks, tensors in outputs:
            self.counters["forwards"] += 1
            self.counters["rows"] += len(chunks)
            for step in self._scheduler.finish(chunks, tensors, seconds):
                self._end(step, step.output(), seconds)
        self.counters["body_us"] += round(seconds * 1e6)

    # --- steps begin and end -------------------------------------------------------------------------------

    def _start(self, step: Step | None) -> None:
        """Starts a step. If it needs no forward or is refused, answers it, and starts the session's next one."""
        while step is not None:
            outcome: torch.Tensor | Exception
            try:
                self._scheduler.start(step, self._begin(step.request))
                if not step.complete:
                    return
                outcome = step.output()
            except Exception as error:
                outcome = error
            self._answer(step.request, outcome)
            step = self._scheduler.end(step)

    def _end(self, step: Step, outcome: torch.Tensor | Exception, seconds: float = 0.0) -> None:
        """Answers a step, and starts the session's next one."""
        self._answer(step.request, outcome, seconds)
        self._start(self._scheduler.end(step))

    def _begin(self, request: PendingRequest) -> Sequence[Any]:
        """The runs of a request. Raises the error that it is refused with."""
        session, payload = request.session, request.payload
        with self._lock:
            data = self._waiting.begin(request)
        if isinstance(payload, payloads.Fork):
            if request.header.seq or session.state.holds_memory:
                raise Malformed("only the first request of a session may make it a copy of another one")
            self._fork(session, payload)
            return []
        began = time.perf_counter()
        runs = self._body.begin(session.state, payload, data)
        request.host_seconds += time.perf_counter() - began
        return runs

    def _fork(self, session: Session[Any], fork: payloads.Fork) -> None:
        device, channel, *_ = session.id
        with self._lock:
            parent = self._sessions.get((device, channel, fork.parent, fork.parent_epoch))
        if parent is None:
            raise Evicted("the worker does not hold the session that was to be copied")
        session.state = parent.state.fork()

    def _answer(self, request: PendingRequest, outcome: torch.Tensor | Exception, seconds: float = 0.0) -> None:
        """Answers a request with its output, or refuses it with an error.

        Args:
            seconds: how long the forward took that completed it; 0 if it needed none.
        """
        with self._lock:
            self._waiting.answered(request)
        if isinstance(outcome, Closed):
            return
        began = time.perf_counter()
        reply: payloads.AnyReply
        tensor: memoryview | bytes = b""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            reply, tensor = self._body.reply(request.session.state, request.payload, outcome)
            reply = self._timed(request, reply, began, seconds)
            request.session.state.commit()
        except SplitError as error:
            reply = refusal(error)
            request.session.state.undo()
        except torch.AcceleratorError:
            # The GPU takes no more work from this process.
            raise
        except Exception as error:
            reply = refusal(error)
        if isinstance(reply, payloads.Refusal):
            self.counters[f"refused_{reply.reason}"] += 1
        self._reply(request, reply, tensor)
        # Steps without a forward would have it wait for their next ones as often as their device likes.
        ran = seconds > 0 and isinstance(reply, payloads.Result)
        if ran and not (request.prefill or self._scheduler.has_more(request.session)):
            self._delay.answered(request.session, time.perf_counter())
        if isinstance(reply, payloads.Refusal) and (
            reply.reason == "failed" or (reply.reason == "evicted" and request.session.state.holds_memory)
        ):
            # The session's state is lost or may be half written, so the device has to open another one.
            with self._lock:
                self._sessions.close(request.session.id)
            self.wake()

    def _timed(
        self, request: PendingRequest, reply: payloads.AnyReply, began: float, seconds: float
    ) -> payloads.AnyReply:
        """Counts a step that has run, and adds to its reply how long that took."""
        if not isinstance(request.payload, payloads.Step | payloads.Denoise):
            return reply
        assert isinstance(reply, payloads.Result | payloads.Denoised)
        with self._lock:
            self._sessions.forget(request.session, request.payload.acked)
        host = request.host_seconds + time.perf_counter() - began
        body = min(seconds, began - request.arrived)
        self.counters["steps"] += 1
        self.counters["tokens"] += request.tokens
        self.counters["queue_us"] += round((began - request.arrived - body) * 1e6)
        return msgspec.structs.replace(reply, body_us=round(body * 1e6), worker_us=round(host * 1e6))

    # --- memory --------------------------------------------------------------------------------------------

    def _evict_for(self, starved: Step, own: bool = True) -> bool:
        """Evicts sessions to free memory for another one's step. Returns whether there were some to evict.

        Args:
            own: as for `SessionTable.victims`.
        """
        by, left = starved.request.session, starved.cost - sum(starved.done)
        with self._lock:
            victims = self._sessions.victims(by, left, own)
            for victim in victims:
                self._sessions.evict(victim)
        for victim in victims:
            self._sessions.log.info(by.member, "session %s of device %s evicted", victim.label, victim.member)
            self.counters["evictions"] += 1
            self._drop(victim, Evicted("the session's memory went to another one"))
        return bool(victims)

    def _free_closed(self) -> None:
        with self._lock:
            closed = [self._sessions.closed.popleft() for _ in range(len(self._sessions.closed))]
        for session in closed:
            self._drop(session, Closed())

    def _drop(self, session: Session[Any], error: Exception) -> None:
        """Refuses all steps of a session with an error, and frees its memory."""
        for step in self._scheduler.cancel(session):
            self._answer(step.request, error)
        self._delay.forget(session)
        session.free()
