"""The scheduler: which tokens go into the next forward.

Every decoding row that is ready goes into it. What is left of the budget goes to prefills, in chunks, so that
decoding rows wait no longer than one chunk; devices take turns. Where forwards are slow, the prefill of a device
that has nothing else under way goes first.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from split_common.engine.rows import Run, Store
from split_common.errors import Busy

#: A step of at most this many tokens is decoding (speculative decoding verifies several at once).
DECODE_TOKENS = 16

#: Most rows in one forward.
MAX_ROWS = 256

#: Tokens of prefill in one forward, at least and at most.
MIN_CHUNK = 16
MAX_CHUNK = 512

#: While anybody decodes, prefill may lengthen a forward by this share of a forward without it.
SLACK = 1.0

#: Seconds after its last step during which a session is held to be decoding.
DECODING_FOR = 1.0

#: Seconds of a forward above which prefill does not wait for rows that are away, and a newcomer's goes before those
#: that are there: somebody waits for a first token, and on such hardware both together take as long as one by one.
SLOW_FORWARD = 0.05

#: A forward waits for decoding sessions that are expected within so many times what a forward takes, and as long
#: beyond the time when they are expected.
SOON = 1.0

#: The most that it waits for a session since that was answered, in the same unit.
GATHER_SHARE = 5.0


@dataclass(eq=False)
class Job:
    """A step of a session.

    `start` is called when the session's earlier steps are done; it makes the rows ready and returns the runs, or
    raises what the step is refused with. `finish` is called once, with the output `[tokens, width]` or that error.
    """

    session: Hashable
    device: Hashable
    tokens: int
    start: Callable[[], Sequence[Run]]
    finish: Callable[[torch.Tensor | Exception], None]
    arrived: float = field(default_factory=time.perf_counter)
    runs: Sequence[Run] = ()
    #: Whether a forward with a part of it is under way: there is one at a time.
    in_flight: bool = False
    done: list[int] = field(default_factory=list)
    outputs: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def decodes(self) -> bool:
        return self.tokens <= DECODE_TOKENS

    @property
    def complete(self) -> bool:
        return all(done == len(run.positions) for done, run in zip(self.done, self.runs, strict=True))

    def result(self) -> torch.Tensor:
        outputs = [part for parts in self.outputs for part in parts]
        # Most have one part, which may be large: it is not copied.
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


@dataclass(frozen=True)
class Piece:
    """A part of one of a job's runs, to go into the next forward."""

    job: Job
    index: int
    run: Run


class ChunkBudget:
    """How many tokens of prefill a forward may take: as many as fit into the slack, by how long forwards take."""

    def __init__(self) -> None:
        #: Seconds that a forward without prefill takes; 0 until there was one.
        self.base = 0.0
        #: Seconds that a token of prefill adds to it.
        self._token = 0.0
        self._decoded_at = float("-inf")

    def observe(self, decoding: int, prefill: int, seconds: float) -> None:
        """A forward with this many decoding rows and tokens of prefill took so long."""
        if decoding:
            self._decoded_at = time.monotonic()
        if not prefill:
            self.base = _average(self.base, seconds)
        elif self.base or not decoding:
            others = self.base if decoding else 0.0
            self._token = _average(self._token, max(0.0, seconds - others) / prefill)

    def tokens(self) -> int:
        """Tokens of prefill for the next forward."""
        if time.monotonic() - self._decoded_at > DECODING_FOR:
            return MAX_CHUNK
        if not self._token:
            return MIN_CHUNK
        return max(MIN_CHUNK, min(MAX_CHUNK, int(SLACK * self.base / self._token)))


def _average(old: float, new: float) -> float:
    return new if not old else 0.8 * old + 0.2 * new


class Gathering:
    """Which sessions are about to come back with their next step, so that the next forward waits for them.

    A forward of many rows takes hardly longer than one of a few. Whoever comes back just after it has begun would
    wait for the whole of it, and sessions that step together once would fall apart.
    """

    def __init__(self) -> None:
        #: When each session was answered that has not come back since, and how long it took lately to do so.
        self._away: dict[Hashable, float] = {}
        self._turnaround: dict[Hashable, float] = {}

    def answered(self, session: Hashable, now: float) -> None:
        self._away[session] = now

    def came(self, session: Hashable, now: float) -> None:
        if (since := self._away.pop(session, None)) is not None:
            self._turnaround[session] = _average(self._turnaround.get(session, 0.0), now - since)

    def forget(self, session: Hashable) -> None:
        self._away.pop(session, None)
        self._turnaround.pop(session, None)

    def until(self, forward: float, now: float) -> float:
        """When the next forward, which takes so many seconds, need not wait any longer; 0 if for nobody."""
        patience, soon = GATHER_SHARE * forward, SOON * forward
        until = 0.0
        for session, since in self._away.items():
            usual = self._turnaround.get(session, patience)
            if usual < patience and since + usual < now + soon:
                until = max(until, since + min(patience, usual + soon))
        return until


class Scheduler:
    """Jobs that wait and jobs that run. One thread uses it.

    Args:
        store: the rows' memory.
        make_room: called when nothing fits; frees memory of others and says whether it did.
        divisible: whether a run may go through in chunks; not if its rotary embedding depends on its last position.
    """

    def __init__(
        self, store: Store, make_room: Callable[[Job], bool] = lambda _: False, *, divisible: bool = True
    ) -> None:
        self._store = store
        self._make_room = make_room
        self._divisible = divisible
        self._active: OrderedDict[Hashable, Job] = OrderedDict()
        self._waiting: dict[Hashable, deque[Job]] = {}
        # Devices that had a chunk of prefill, the last one last.
        self._turns: dict[Hashable, None] = {}
        # When each device last had a row that decoded, and whether the last forward was a newcomer's.
        self._decoded_at: dict[Hashable, float] = {}
        self._went_first = False
        self.budget = ChunkBudget()

    @property
    def idle(self) -> bool:
        return not self._active

    def busy_sessions(self) -> set[Hashable]:
        """Sessions with a step in hand."""
        return set(self._active)

    def add(self, job: Job) -> None:
        if job.session in self._active:
            self._waiting.setdefault(job.session, deque()).append(job)
        else:
            self._activate(job)

    def newcomers(self) -> list[Job]:
        """Prefills that should not wait for those that decode: their devices have nothing here that does.

        After each forward of theirs it is the others' turn.
        """
        now = time.monotonic()
        self._decoded_at = {device: then for device, then in self._decoded_at.items() if now - then < DECODING_FOR}
        if self._went_first or not self._decoded_at or self.budget.base < SLOW_FORWARD:
            return []
        return [
            job
            for job in self._active.values()
            if not (job.decodes or job.in_flight or job.device in self._decoded_at)
        ]

    @property
    def hurries(self) -> bool:
        """Whether the next forward should wait for nobody: prefill is ready, and runs while others are away."""
        return self.budget.base >= SLOW_FORWARD and any(not job.decodes for job in self._active.values())

    def next_batch(self) -> list[Piece]:
        """What to run next, beside what is under way; empty if nothing is ready."""
        newcomers = self.newcomers()
        first = self._fill(newcomers) if newcomers else []
        self._went_first = bool(first)
        if first:
            return self._begin(first)
        while ready := [job for job in self._active.values() if not job.in_flight]:
            if batch := self._fill(ready):
                return self._begin(batch)
            # Nothing fits, so the oldest job gets room, or is told to come back.
            if not self._make_room(ready[0]):
                self._end(ready[0], Busy("the worker's KV memory is full", retry_after=0.5))
        return []

    @staticmethod
    def _begin(batch: list[Piece]) -> list[Piece]:
        for piece in batch:
            piece.job.in_flight = True
        return batch

    def finish(self, batch: Sequence[Piece], outputs: Sequence[torch.Tensor], seconds: float) -> None:
        """Takes the outputs of a batch that was run in so many seconds."""
        prefill = sum(len(piece.run.positions) for piece in batch if not piece.job.decodes)
        self.budget.observe(sum(piece.job.decodes for piece in batch), prefill, seconds)
        for piece, output in zip(batch, outputs, strict=True):
            piece.job.outputs[piece.index].append(output)
            piece.job.done[piece.index] += len(piece.run.positions)
        for job in {id(piece.job): piece.job for piece in batch}.values():
            job.in_flight = False
            if job.decodes:
                self._decoded_at[job.device] = time.monotonic()
            if self._active.get(job.session) is not job:
                # It was cancelled meanwhile.
                continue
            if not job.decodes:
                # The next forward's chunk is another device's.
                self._turns.pop(job.device, None)
                self._turns[job.device] = None
            if job.complete:
                self._end(job, job.result())

    def fail(self, job: Job, error: Exception) -> None:
        """Ends a job whose forward failed."""
        self._end(job, error)

    def cancel(self, session: Hashable, error: Exception) -> None:
        """Ends all jobs of a session with an error; what a forward under way makes of them is dropped."""
        jobs = [self._active.pop(session)] if session in self._active else []
        jobs += self._waiting.pop(session, ())
        for job in jobs:
            job.finish(error)

    def _activate(self, job: Job) -> None:
        try:
            job.runs = [run for run in job.start() if len(run.positions)]
        except Exception as error:
            job.finish(error)
            self._next_of(job.session)
            return
        job.done = [0] * len(job.runs)
        job.outputs = [[] for _ in job.runs]
        self._active[job.session] = job
        if not job.runs:
            self._end(job, torch.empty(0, 0))

    def _end(self, job: Job, outcome: torch.Tensor | Exception) -> None:
        del self._active[job.session]
        job.finish(outcome)
        self._next_of(job.session)

    def _next_of(self, session: Hashable) -> None:
        if session in self._waiting:
            job = self._waiting[session].popleft()
            if not self._waiting[session]:
                del self._waiting[session]
            self._activate(job)

    def _fill(self, ready: Sequence[Job]) -> list[Piece]:
        batch: list[Piece] = []
        room = self._store.free
        for job in ready:
            if not job.decodes:
                continue
            pieces = [Piece(job, index, run) for index, run in enumerate(job.runs)]
            cost = sum(self._store.cost(piece.run.row, len(piece.run.positions)) for piece in pieces)
            if cost <= room and len(batch) + len(pieces) <= MAX_ROWS:
                room -= cost
                batch += pieces
        budget = self.budget.tokens()
        for job in self._in_turns(ready):
            for index, run in enumerate(job.runs):
                begin = job.done[index]
                count = len(run.positions) - begin
                if self._divisible:
                    count = min(budget, count)
                cost = self._store.cost(run.row, count)
                if count <= 0 or cost > room or len(batch) >= MAX_ROWS:
                    continue
                room -= cost
                budget -= count
                part = Run(run.row, run.states[begin : begin + count], run.positions[begin : begin + count])
                batch.append(Piece(job, index, part))
        return batch

    def _in_turns(self, ready: Sequence[Job]) -> list[Job]:
        """Prefilling jobs, one of each device before the second of any; who had the last chunk comes last."""
        queues: dict[Hashable, deque[Job]] = {}
        for job in ready:
            if not job.decodes:
                queues.setdefault(job.device, deque()).append(job)
        here = {job.device for job in self._active.values()}
        self._turns = {device: None for device in self._turns if device in here}
        last = [device for device in self._turns if device in queues]
        queues = {
            device: queues[device] for device in [*(each for each in queues if each not in self._turns), *last]
        }
        order: list[Job] = []
        while queues:
            for device in list(queues):
                order.append(queues[device].popleft())
                if not queues[device]:
                    del queues[device]
        return order
