"""The worker's sessions: whose they are, what they hold, and which request comes next in each."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from split_common import headers, payloads
from split_common.channel import Channel, SessionKeys
from split_common.engine.rows import Row, Run
from split_common.engine.runner import Runner
from split_common.errors import Busy, Malformed, OutOfOrder, PromptTooLong

#: Sessions that a worker holds unless told otherwise.
MAX_SESSIONS = 1024

#: Rows that one session may have.
MAX_ROWS = 256

#: Seconds without a request after which a session's memory is freed.
IDLE_TIMEOUT = 900.0

#: Seconds without a request after which a session's memory may be taken for another one.
EVICT_AFTER = 10.0

#: Tokens that each session is expected to grow by: a new one is admitted only if there is room for that.
GROWTH = 64

#: Requests of one session that may wait; a device never has more in flight.
MAX_WAITING = 256

#: Bytes of replies that are kept to be sent again, in all: those of the sessions that were used least lately are
#: dropped when they are counted, which they are whenever so many bytes have been added.
MAX_REPLIES = 1024**3
COUNTED_EVERY = 128 * 1024**2

#: A session: the device's peer id, and its channel, session and epoch numbers.
SessionId = tuple[bytes, int, int, int]
Frames = tuple[headers.Relay, bytes]


@dataclass(eq=False)
class Session:
    """The KV cache of one generation, and the protocol's state of it."""

    id: SessionId
    keys: SessionKeys
    #: Sessions are numbered as they are opened: the newest gives way first.
    age: int = 0
    rows: list[Row] = field(default_factory=list)
    #: The next request's number, and how many were answered.
    expected: int = 0
    done: int = 0
    replies: dict[int, Frames] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)
    #: The rows before a step's selection, until the step has run.
    _before: list[Row] = field(default_factory=list)

    def admit(self, seq: int) -> bool:
        """Whether a request is the next one, to be run; if not, it was seen before.

        Raises:
            OutOfOrder: requests before it have not arrived, or too many wait.
        """
        self.used = time.monotonic()
        if seq < self.expected:
            return False
        if seq > self.expected or self.expected - self.done >= MAX_WAITING:
            raise OutOfOrder(f"request {seq} of a session that expects {self.expected}")
        self.expected += 1
        return True

    def answered(self, frames: Frames) -> None:
        self.replies[frames[0].seq] = frames
        self.done += 1
        if len(self.replies) > MAX_WAITING:
            # A device that acknowledges nothing: it has no more than this in flight.
            del self.replies[next(iter(self.replies))]

    def forget(self, acked: int) -> None:
        """Drops the replies that the device has."""
        for seq in [seq for seq in self.replies if seq < acked]:
            del self.replies[seq]

    def begin(self, step: payloads.Step, states: torch.Tensor, runner: Runner) -> list[Run]:
        """Makes the rows ready for a step over states `[tokens, width]`: selected, and cut back to its starts.

        Tokens of a step that fails later stay behind: the next one's `start` cuts them off.

        Raises:
            Malformed: rows, positions or width do not fit the session; nothing was changed.
            PromptTooLong: a row would exceed the model's positions, or the worker's whole memory.
        """
        source = list(range(len(self.rows))) if step.select is None else step.select
        self._check(step, source, runner)
        if step.select is not None:
            self._select(step.select)
        wanted = max((run.row + 1 for run in step.rows), default=0)
        self.rows += [runner.store.new_row() for _ in range(wanted - len(self.rows))]
        parts = torch.split(states, [len(run.positions) for run in step.rows])
        runs = []
        for run, part in zip(step.rows, parts, strict=True):
            self.rows[run.row].truncate(run.start)
            runs.append(Run(self.rows[run.row], part, run.positions))
        return runs

    def _check(self, step: payloads.Step, source: list[int], runner: Runner) -> None:
        if step.width != runner.width:
            raise Malformed(f"hidden states of width {step.width}, the model has {runner.width}")
        if any(old >= len(self.rows) for old in source):
            raise Malformed("a step selects a row that the session does not have")
        numbers = [run.row for run in step.rows]
        if len(set(numbers)) < len(numbers) or max([len(source), *(number + 1 for number in numbers)]) > MAX_ROWS:
            raise Malformed(f"a step has each row at most once, and at most {MAX_ROWS} rows")
        for run in step.rows:
            length = self.rows[source[run.row]].length if run.row < len(source) else 0
            if run.start > length:
                raise Malformed(f"a run starts at {run.start}, its row has {length} tokens")
            tokens = run.start + len(run.positions)
            if max(tokens, max(run.positions) + 1) > runner.max_positions:
                raise PromptTooLong(f"a row exceeds the model's {runner.max_positions} positions")
            if tokens > runner.store.capacity:
                raise PromptTooLong(f"{tokens} tokens exceed the worker's memory for {runner.store.capacity}")

    def _select(self, select: list[int]) -> None:
        """Row i becomes row `select[i]`; a row that is taken twice is forked."""
        self._before = self.rows
        self.rows = [
            self._before[old].fork() if old in select[:new] else self._before[old] for new, old in enumerate(select)
        ]

    def commit(self) -> None:
        """The step that was begun has run: frees the rows that it did not select."""
        _free_rows_beside(self._before, self.rows)
        self._before = []

    def undo(self) -> None:
        """The step that was begun has failed: it may come again, and its selection with it."""
        if self._before:
            _free_rows_beside(self.rows, self._before)
            self.rows, self._before = self._before, []

    def free(self) -> None:
        """Gives its rows' memory back."""
        self.undo()
        _free_rows_beside(self.rows, [])
        self.rows = []


class SessionTable:
    """All sessions of a worker. Used under the worker's lock.

    A closed session's rows are freed by the thread that computes: it finds them in `closed`.
    """

    def __init__(self, max_sessions: int = MAX_SESSIONS, idle_timeout: float = IDLE_TIMEOUT) -> None:
        self._sessions: dict[SessionId, Session] = {}
        self._max_sessions = max_sessions
        self._idle_timeout = idle_timeout
        self._ages = itertools.count()
        self.closed: deque[Session] = deque()
        #: Bytes of replies since they were counted.
        self._uncounted = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def room(self, free_tokens: int) -> int:
        """Sessions that may be opened, with memory for so many tokens left: idle ones give way."""
        idle = sum(map(self._is_idle, self._sessions.values()))
        return max(idle, self._unused(free_tokens))

    def _unused(self, free_tokens: int) -> int:
        by_memory = free_tokens // GROWTH - len(self._sessions)
        return max(0, min(self._max_sessions - len(self._sessions), by_memory))

    def get(self, id_: SessionId) -> Session | None:
        return self._sessions.get(id_)

    def open(self, id_: SessionId, channel: Channel, tokens: int, free_tokens: int) -> Session:
        """Opens a session whose first step has `tokens` tokens. Raises Busy when the worker is full."""
        self.free_idle()
        if self._unused(free_tokens - tokens) < 1 and len(self._sessions):
            # The next try will find the room that an idle session leaves.
            if (idle := self._idlest()) is not None:
                self.close(idle.id)
            raise Busy("the worker has no room for another session", retry_after=0.5)
        session = Session(id_, channel.session_keys(id_[2], id_[3]), next(self._ages))
        self._sessions[id_] = session
        return session

    def answered(self, session: Session, frames: Frames) -> None:
        """Keeps a reply of a session, to be sent again."""
        session.answered(frames)
        self._uncounted += len(frames[1])
        if self._uncounted > COUNTED_EVERY:
            self._uncounted = kept = 0
            for each in sorted(self._sessions.values(), key=lambda session: session.used, reverse=True):
                kept += sum(len(body) for _, body in each.replies.values())
                if kept > MAX_REPLIES:
                    each.replies.clear()

    def victim(self, asking: Session) -> Session | None:
        """A session whose memory another one may have: one that is idle, else the newest if it is newer."""
        if (idle := self._idlest()) is not None and idle is not asking:
            return idle
        others = [session for session in self._sessions.values() if session is not asking and session.rows]
        newest = max(others, key=lambda session: session.age, default=None)
        return newest if newest is not None and newest.age > asking.age else None

    def _idlest(self) -> Session | None:
        longest = min(self._sessions.values(), key=lambda session: session.used, default=None)
        return longest if longest is not None and self._is_idle(longest) else None

    @staticmethod
    def _is_idle(session: Session) -> bool:
        return time.monotonic() - session.used > EVICT_AFTER

    def evict(self, session: Session) -> None:
        """Forgets a session whose rows the caller frees; its device will find it lost."""
        del self._sessions[session.id]

    def close(self, id_: SessionId) -> None:
        session = self._sessions.pop(id_, None)
        if session is not None:
            self.closed.append(session)

    def close_where(self, condition: Callable[[SessionId], bool]) -> None:
        for id_ in [id_ for id_ in self._sessions if condition(id_)]:
            self.close(id_)

    def free_idle(self) -> None:
        now = time.monotonic()
        self.close_where(lambda id_: now - self._sessions[id_].used > self._idle_timeout)


def _free_rows_beside(rows: list[Row], kept: list[Row]) -> None:
    for row in rows:
        if all(row is not other for other in kept):
            row.free()
